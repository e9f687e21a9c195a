"""Score answers against references, one by one and all together."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # it has no types
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from finetune_api.stages import EvaluateSpec
from finetune_trainer.evaluation.query_execution import execution
from finetune_trainer.queries.sandbox import Sandbox

Row = dict[str, Any]
"""Measurements of one row: `row` and, depending on the metrics, `nll` (nats), `tokens`, `answer`, `finished`, `scores`
by metric and `error`, the reason why a query failed."""
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scorer:
    """Scores single answers from 0 to 1 by the metrics that are defined on single answers."""

    def __init__(self, spec: EvaluateSpec, database: Sandbox | None) -> None:
        self.spec, self.database = spec, database
        kinds = [metric for metric in spec.metrics if metric in ROUGE]
        self.rouge = RougeScorer(kinds, use_stemmer=False) if kinds else None

    def score(self, answer: str, reference: str) -> Row:
        """Return `scores` by metric and, if a query failed, `error`.

        ROUGE is the F measure of rouge-score without stemming, as Hugging Face's `evaluate` computes it.
        """
        found: dict[str, float] = {}
        if self.rouge is not None:
            found |= {name: one.fmeasure for name, one in self.rouge.score(reference, answer).items()}
        if "exactMatch" in self.spec.metrics:
            found["exactMatch"] = float(self._plain(answer) == self._plain(reference))
        error = ""
        if self.database is not None:
            found["executionAccuracy"], error = execution(self.database, answer, reference)
        ordered = {metric: found[metric] for metric in self.spec.metrics if metric in found}
        return {"scores": ordered, **({"error": error} if error else {})}

    def _plain(self, text: str) -> str:
        """Normalize text for `exactMatch`: Unicode NFC, stripped, with each run of white space as one space."""
        text = unicodedata.normalize("NFC", text)
        text = text.casefold() if self.spec.ignore_case else text
        text = text.translate(_PUNCTUATION) if self.spec.ignore_punctuation else text
        return " ".join(text.split())


def totals(spec: EvaluateSpec, rows: Sequence[Row], references: Sequence[str]) -> dict[str, float]:
    """Return each metric over all rows, in the order of the job. `references` has one text per row."""
    answers = [str(row.get("answer", "")) for row in rows]
    return {metric: _total(metric, rows, answers, references) for metric in spec.metrics}


def perplexity(nlls: Iterable[float], tokens: Iterable[int]) -> float:
    """Return exp of the mean negative log-likelihood per token; sums are exact, so the order of rows has no effect."""
    count = sum(tokens)
    mean = math.fsum(nlls) / count if count else math.nan
    return math.exp(mean) if mean < 700 else math.inf


def _total(metric: str, rows: Sequence[Row], answers: list[str], references: Sequence[str]) -> float:
    if metric == "perplexity":
        return perplexity((row["nll"] for row in rows), (row["tokens"] for row in rows))
    if metric in ("bleu", "chrf"):
        scorer = BLEU() if metric == "bleu" else CHRF()
        return float(scorer.corpus_score([answer.strip() for answer in answers], [list(references)]).score)
    return math.fsum(row["scores"][metric] for row in rows) / len(rows)
