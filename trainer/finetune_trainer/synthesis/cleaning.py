"""Reject rows that repeat other rows or share text with evaluation data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rensa import RMinHash, RMinHashLSH

from finetune_api.stages import Dedup
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Made, Outcome, Rejected

_WORD = re.compile(r"\w+")
Grams = set[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Return a text's words for comparison: without case and punctuation."""
    return _WORD.findall(text.casefold())


class EvaluationTexts:
    """Texts that rows must not share, compared by runs of `ngram` words; shorter texts are compared as a whole.

    Args:
        texts: the texts of the evaluation data.
    """

    def __init__(self, texts: Iterable[str], ngram: int) -> None:
        self.ngram = ngram
        self._grams: set[int] = set()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            split = words(text)
            if len(split) < ngram:
                self._short.add(tuple(split))
            # 64-bit hashes: the texts of large benchmarks do not fit into memory, and collisions are very rare.
            self._grams.update(hash(gram) for gram in _grams(split, ngram))
        self._short.discard(())

    def has(self, text: str) -> bool:
        """Return whether the text shares a run of words with an evaluation text, or equals a short one."""
        split = words(text)
        return tuple(split) in self._short or any(hash(gram) in self._grams for gram in _grams(split, self.ngram))


def texts_in(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, without the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def decontaminated(outcomes: Iterable[Outcome], known: EvaluationTexts | None) -> Iterator[Outcome]:
    """Yield the outcomes, with rows rejected that share text with evaluation data."""
    for outcome in outcomes:
        if known is not None and isinstance(outcome, Made) and any(map(known.has, _own_texts(outcome))):
            yield Rejected(reasons.CONTAMINATED, outcome.instruction, outcome.provenance)
        else:
            yield outcome


def deduplicated(outcomes: Iterable[Outcome], spec: Dedup) -> Iterator[Outcome]:
    """Yield the outcomes, with rows rejected whose prompts are equal or similar to an earlier row's."""
    seen: set[tuple[str, ...]] = set()
    similar = _Similar(spec)
    for outcome in outcomes:
        if not isinstance(outcome, Made):
            yield outcome
            continue
        split = words(outcome.instruction) or [outcome.instruction]
        reason = reasons.DUPLICATE if tuple(split) in seen else similar.reason(split)
        seen.add(tuple(split))
        yield outcome if reason is None else Rejected(reason, outcome.instruction, outcome.provenance)


class _Similar:
    """A MinHash index of the prompts kept so far; its candidates are compared exactly."""

    def __init__(self, spec: Dedup) -> None:
        self._spec = spec
        self._kept: list[Grams] = []
        self._index = RMinHashLSH(spec.threshold, spec.num_perm, bands(spec.threshold, spec.num_perm))

    def reason(self, split: list[str]) -> str | None:
        if not self._spec.minhash:
            return None
        grams = set(_grams(split, self._spec.ngram)) or {tuple(split)}
        hashed = RMinHash(num_perm=self._spec.num_perm, seed=1)
        hashed.update(["\x1f".join(gram) for gram in sorted(grams)])
        if any(_jaccard(grams, self._kept[key]) >= self._spec.threshold for key in self._index.query(hashed)):
            return reasons.SIMILAR
        self._index.insert(len(self._kept), hashed)
        self._kept.append(grams)
        return None


def bands(threshold: float, num_perm: int) -> int:
    """Return the smallest number of bands, a divisor of `num_perm`, that finds a pair at the threshold with 95%.

    The probability is 1 - (1 - t^r)^b for b bands of r rows.
    """
    divisors = [count for count in range(1, num_perm + 1) if num_perm % count == 0]
    return next((b for b in divisors if 1 - (1 - threshold ** (num_perm // b)) ** b >= 0.95), num_perm)


def _jaccard(first: Grams, second: Grams) -> float:
    return len(first & second) / len(first | second)


def _grams(split: list[str], count: int) -> Iterator[tuple[str, ...]]:
    return (tuple(split[at : at + count]) for at in range(len(split) - count + 1))


def _own_texts(row: Made) -> Iterator[str]:
    """Yield the row's own texts, without a schema or a document that many rows share."""
    yield row.instruction
    yield row.messages[-1]["content"]
    yield from texts_in({name: value for name, value in row.columns.items() if name != "quote"})
