"""Generate question and answer pairs from documents, each grounded in its document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune_api.stages import Questions
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Effect, Item, Made, Outcome, Rejected, Reply, Work
from finetune_trainer.synthesis.parse import flag_of, pairs_of
from finetune_trainer.synthesis.prompts import prompt
from finetune_trainer.synthesis.teacher_requests import GaveUp, Teacher

_BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?。])\s"), re.compile(r"\s"))
"""Patterns of positions where a chunk may end, best first."""
_REFERS_TO_DOCUMENT = re.compile(
    r"\b(the|this|that|given|above|provided) (document|text|passage|excerpt|article|paragraph|author|context)\b",
    re.IGNORECASE,
)
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Chunk:
    """A part of a document."""

    document: int
    """Index of the document's row."""
    start: int
    """Position of its first character in the document."""
    text: str


def chunks(document: int, text: str, size: int, overlap: int) -> Iterator[Chunk]:
    """Yield chunks of at most `size` characters of a document, which overlap by about `overlap` characters."""
    start = 0
    while start < len(text):
        end = _chunk_end(text, start, size)
        piece = text[start:end].strip()
        if piece:
            yield Chunk(document, start, piece)
        if end >= len(text):
            return
        start = max(_word_start(text, max(end - overlap, start + 1), end), start + 1)


def question_items(pieces: list[Chunk], spec: Questions, teacher: Teacher) -> list[Item]:
    """Return an item for each chunk with a distinct text."""
    first = {piece.text: piece for piece in reversed(pieces)}
    once = [piece for piece in pieces if first[piece.text] is piece]
    return [Item(f"{piece.document}:{piece.start}", partial(_work, piece, spec, teacher)) for piece in once]


def _work(chunk: Chunk, spec: Questions, teacher: Teacher) -> Work:
    names = ("question", "answer", "quote") if spec.grounding != "none" else ("question", "answer")
    source = {"method": "questions", **_source(chunk)}
    try:
        pairs, asked = yield from teacher.objects(
            "questions", lambda value: pairs_of(value, *names), document=chunk.text, count=spec.num_questions
        )
    except GaveUp as error:
        return [Rejected(error.reason, error.last, source)]
    outcomes: list[Outcome] = []
    for number, pair in enumerate(pairs[: spec.num_questions]):
        provenance = {**source, "pair": number, "teacher": teacher.name, **asked}
        outcomes.append((yield from _check_pair(pair, chunk, spec, teacher, provenance)))
    return outcomes


def _check_pair(
    pair: dict[str, str], chunk: Chunk, spec: Questions, teacher: Teacher, provenance: dict[str, Any]
) -> Any:
    fault = _fault(pair, chunk.text, spec)
    if fault is not None:
        return Rejected(fault, f"{pair['question']}\n→ {pair['answer']}", provenance)
    if spec.grounding == "judge":
        rejected = yield from _check_support(pair, chunk, teacher, provenance)
        if rejected is not None:
            return rejected
    shown = pair["question"]
    if spec.include_document:
        shown = prompt("document-row", document=chunk.text, question=pair["question"])
    messages = ({"role": "user", "content": shown}, {"role": "assistant", "content": pair["answer"]})
    columns = {name: pair[name] for name in pair}
    return Made(messages, pair["question"], columns, provenance)


def _check_support(pair: dict[str, str], chunk: Chunk, teacher: Teacher, provenance: dict[str, Any]) -> Any:
    asked: dict[str, Any] = {"question": pair["question"], "answer": pair["answer"], "document": chunk.text}
    try:
        supported, judged = yield from teacher.objects("grounded", lambda value: flag_of(value, "supported"), **asked)
    except GaveUp as error:
        return Rejected(error.reason, error.last, provenance)
    provenance["judged"] = judged["request"]
    return None if supported else Rejected(reasons.NOT_SUPPORTED, f"{pair['question']}\n→ {pair['answer']}", provenance)


def _fault(pair: dict[str, str], text: str, spec: Questions) -> str | None:
    if not pair["question"] or not pair["answer"]:
        return reasons.EMPTY
    if not spec.include_document and _REFERS_TO_DOCUMENT.search(pair["question"]):
        return reasons.LEANS
    quoted = _plain(pair.get("quote", ""))
    if spec.grounding != "none" and (not quoted or quoted not in _plain(text)):
        return reasons.NOT_QUOTED
    return None


def _plain(text: str) -> str:
    """Return the words alone: teachers copy text exactly except for quotes, dashes and line breaks."""
    return " " + _NOT_WORDS.sub(" ", text.casefold()).strip() + " " if text.strip() else ""


def _source(chunk: Chunk) -> dict[str, Any]:
    content = hashlib.sha256(chunk.text.encode("utf-8", "replace")).hexdigest()[:16]
    return {"source": chunk.document, "start": chunk.start, "chunk": content}


def _chunk_end(text: str, start: int, size: int) -> int:
    """Return where a chunk ends: at the last good break in its second half."""
    limit = start + size
    if limit >= len(text):
        return len(text)
    for pattern in _BREAKS:
        ends = [match.end() for match in pattern.finditer(text, start + size // 2, limit)]
        if ends:
            return ends[-1]
    return limit


def _word_start(text: str, start: int, end: int) -> int:
    """Return the start of the first word from `start` on."""
    gap = re.compile(r"\s").search(text, start, end)
    return gap.end() if gap else start


__all__ = ["Chunk", "Effect", "Reply", "chunks", "question_items"]
