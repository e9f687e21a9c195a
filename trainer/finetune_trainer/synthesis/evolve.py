"""Evol-Instruct (arXiv 2304.12244): rewrite instructions in rounds to be harder or different.

Its four elimination rules apply: no information gain, a short apology, an answer of only punctuation and stop words,
and words of the evolving prompt in the instruction.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import partial
from typing import Any

from finetune_api.stages import Evolve
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Effect, Item, Made, Outcome, Rejected, Reply, Work
from finetune_trainer.synthesis.parse import flag_of, text_of
from finetune_trainer.synthesis.teacher_requests import GaveUp, Teacher

SORRY_WORDS = 80
"""An answer with "sorry" and fewer words is an apology (the paper's bound)."""
_COPIED = re.compile(
    r"given (prompt|instruction)|(re-?written|evolved|created|new) (prompt|instruction)|#\s*(prompt|instruction)\s*#"
    r"|<<<|>>>|evolve an instruction",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
STOP_WORDS = frozenset(
    {
        *("a", "about", "after", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "been", "but", "by"),
        *("can", "could", "did", "do", "does", "for", "from", "had", "has", "have", "he", "her", "here", "him", "his"),
        *("how", "i", "if", "in", "into", "is", "it", "its", "just", "me", "more", "my", "no", "not", "of", "on", "or"),
        *("our", "out", "she", "so", "some", "such", "than", "that", "the", "their", "them", "then", "there", "these"),
        *("they", "this", "those", "to", "too", "up", "us", "very", "was", "we", "were", "what", "when", "where"),
        *("which", "while", "who", "will", "with", "would", "you", "your"),
    }
)


def evolve_items(seeds: list[tuple[int, str]], spec: Evolve, teacher: Teacher) -> list[Item]:
    """Return an item for each distinct seed, a pair of row number and instruction."""
    first: dict[str, int] = {}
    for number, text in seeds:
        first.setdefault(text, number)
    once = [(number, text) for number, text in seeds if first[text] == number]
    return [Item(str(number), partial(_work, number, text, spec, teacher)) for number, text in once]


def _work(number: int, seed: str, spec: Evolve, teacher: Teacher) -> Work:
    content = hashlib.sha256(seed.encode("utf-8", "replace")).hexdigest()[:16]
    source = {"method": "evolve", "source": number, "seed": content, "teacher": teacher.name}
    draw = random.Random(f"{teacher.seed} {content}")
    outcomes: list[Outcome] = []
    if spec.include_seeds:
        outcomes.append((yield from _answer(seed, teacher, {**source, "operator": "none", "round": 0})))
    current = seed
    for turn in range(1, spec.num_evolutions + 1):
        operator = draw.choice(spec.operators)
        outcome = yield from _evolve(current, operator, turn, teacher, {**source, "operator": operator, "round": turn})
        outcomes.append(outcome)
        if isinstance(outcome, Made):
            current = outcome.instruction
    return outcomes if spec.store_evolutions else _last(outcomes)


def _last(outcomes: list[Outcome]) -> list[Outcome]:
    made = [outcome for outcome in outcomes if isinstance(outcome, Made)]
    return [outcome for outcome in outcomes if isinstance(outcome, Rejected) or outcome is made[-1]]


def _evolve(current: str, operator: str, turn: int, teacher: Teacher, provenance: dict[str, Any]) -> Any:
    template = f"evolve-{operator}"
    try:
        evolved, asked = yield from teacher.objects(
            template, lambda value: text_of(value, "instruction"), sample=100 * turn, instruction=current
        )
        provenance |= asked
        fault = _instruction_fault(evolved, current)
        if fault is not None:
            return Rejected(fault, evolved, provenance)
        equal, judged = yield from teacher.objects(
            "gain", lambda value: flag_of(value, "equal"), first=current, second=evolved
        )
    except GaveUp as error:
        return Rejected(error.reason, error.last, provenance)
    provenance["judged"] = judged["request"]
    if equal:
        return Rejected(reasons.NO_GAIN, evolved, provenance)
    return (yield from _answer(evolved, teacher, provenance))


def _answer(instruction: str, teacher: Teacher, provenance: dict[str, Any]) -> Any:
    try:
        answer, asked = yield from teacher.reply(instruction)
    except GaveUp as error:
        return Rejected(error.reason, error.last, provenance)
    provenance = {**provenance, "answered": asked["request"]}
    fault = answer_fault(answer)
    if fault is not None:
        return Rejected(fault, f"{instruction}\n→ {answer}", provenance)
    messages = ({"role": "user", "content": instruction}, {"role": "assistant", "content": answer})
    return Made(messages, instruction, {}, provenance)


def _instruction_fault(evolved: str, current: str) -> str | None:
    if not evolved:
        return reasons.EMPTY
    if _COPIED.search(evolved) and not _COPIED.search(current):
        return reasons.COPIED
    return reasons.NO_GAIN if evolved == current else None


def answer_fault(answer: str) -> str | None:
    """Return why the paper's rules eliminate an answer, or None."""
    words = [word.casefold() for word in _WORD.findall(answer)]
    if not [word for word in words if word not in STOP_WORDS]:
        return reasons.NOTHING_SAID
    return reasons.SORRY if "sorry" in words and len(words) < SORRY_WORDS else None


__all__ = ["Effect", "Reply", "answer_fault", "evolve_items"]
