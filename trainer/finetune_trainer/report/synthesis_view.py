"""Build the view of a stage that generates data: the yield, rejections by reason, the cost and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_trainer.progress.formatting import clean, count, number, percent
from finetune_trainer.report.bars import Bars
from finetune_trainer.report.collect import StageRecord, is_number
from finetune_trainer.report.text_cleaning import Excerpt, excerpt


@dataclass(frozen=True)
class SynthesisView:
    """The section of one stage."""

    facts: list[tuple[str, str]]
    reasons: Bars | None
    """Generated rows, and rejections by reason."""
    operators: list[tuple[str, str, str]]
    """Name of the operator, level or method; rows generated; rows rejected."""
    samples: list[tuple[Excerpt | None, Excerpt | None]]
    """Prompt and answer of the first rows."""
    examples: list[tuple[str, list[Excerpt | None]]]
    """Rejected answers by reason."""


def synthesis(stage: StageRecord) -> SynthesisView | None:
    """Return the view of `synthesis.json` of the stage, or None if it generated no data."""
    given = stage.synthesis
    if not given:
        return None
    rejected = _counts(given.get("rejected"))
    made = given.get("rows")
    bars = {"rows made": float(made) if is_number(made) else 0.0} | {clean(name): n for name, n in rejected.items()}
    by = [(name, _object(counts)) for name, counts in _object(given.get("by")).items()]
    examples = _object(given.get("examples"))
    return SynthesisView(
        facts=_facts(given, sum(rejected.values())),
        reasons=Bars("Rows made, and what became none by reason", bars) if any(bars.values()) else None,
        operators=[(clean(str(name)), _shown(one.get("made")), _shown(one.get("rejected"))) for name, one in by],
        samples=[_sample(turns) for turns in given.get("samples") or [] if isinstance(turns, list)],
        examples=[(clean(str(name)), [excerpt(one) for one in _list(found)]) for name, found in examples.items()],
    )


def _facts(given: dict[str, Any], rejected: float) -> list[tuple[str, str]]:
    cost = _object(given.get("cost"))
    share = given.get("yield")
    values = [
        ("Method", given.get("method")),
        ("Teacher", given.get("teacher")),
        ("Items", given.get("items")),
        ("Rows made", given.get("rows")),
        ("Rejected", rejected),
        ("Yield", percent(share) if is_number(share) else None),
        ("Answers paid for", cost.get("answers")),
        ("Prompt tokens", cost.get("prompt_tokens")),
        ("Answer tokens", cost.get("completion_tokens")),
        ("Answers without token counts", cost.get("uncounted") or None),
        ("Price", number(cost["price"]) if is_number(cost.get("price")) else None),
    ]
    return [(name, _shown(value)) for name, value in values if value is not None]


def _sample(turns: list[Any]) -> tuple[Excerpt | None, Excerpt | None]:
    texts = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    return (excerpt(texts[0]), excerpt(texts[-1])) if texts else (None, None)


def _shown(value: Any) -> str:
    return count(value) if is_number(value) else clean(str(value))


def _counts(value: Any) -> dict[str, float]:
    return {str(name): float(one) for name, one in _object(value).items() if is_number(one)}


def _object(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
