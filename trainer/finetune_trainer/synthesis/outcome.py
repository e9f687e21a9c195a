"""Write the stage's files from outcomes: the rows, and a summary of how they were made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from finetune_api.stages import SynthesizeSpec
from finetune_trainer.endpoint.chat import ChatAnswer
from finetune_trainer.endpoint.cost import cost_of
from finetune_trainer.synthesis.cleaning import EvaluationTexts, decontaminated, deduplicated
from finetune_trainer.synthesis.effects import Made, Outcome, Rejected

EXAMPLES = 3
"""Number of examples per rejection reason, and of rows, in the summary."""
EXAMPLE_LENGTH = 2000
"""Maximum characters of an example."""


def cleaned(outcomes: Sequence[Outcome], spec: SynthesizeSpec, known: EvaluationTexts | None) -> list[Outcome]:
    """Return the outcomes, with rows rejected that repeat others or share text with evaluation data."""
    return list(deduplicated(decontaminated(outcomes, known), spec.dedup))


def rows_text(outcomes: Iterable[Outcome]) -> str:
    """Return the content of `rows.jsonl`: `messages`, the method's own columns, and `provenance`."""
    lines = [json.dumps(_row(outcome), ensure_ascii=False) for outcome in outcomes if isinstance(outcome, Made)]
    return "".join(f"{line}\n" for line in lines)


def account(
    outcomes: Sequence[Outcome], items: int, spec: SynthesizeSpec, teacher: str, answers: Iterable[ChatAnswer]
) -> dict[str, Any]:
    """Return the content of `synthesis.json`: counts, rejections by reason with examples, and cost; deterministic."""
    rejected = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
    made = [outcome for outcome in outcomes if isinstance(outcome, Made)]
    counts = Counter(outcome.reason for outcome in rejected)
    ordered = dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    return {
        "method": spec.method,
        "teacher": teacher,
        "items": items,
        "outcomes": len(outcomes),
        "rows": len(made),
        "yield": len(made) / len(outcomes) if outcomes else 0.0,
        "rejected": ordered,
        "by": _by_operator(outcomes),
        "examples": {reason: _examples(rejected, reason) for reason in ordered},
        "samples": [[dict(message) for message in row.messages] for row in made[:EXAMPLES]],
        "cost": asdict(cost_of(answers, spec.teacher.endpoint)),
    }


def _row(row: Made) -> dict[str, Any]:
    return {"messages": [dict(message) for message in row.messages], **row.columns, "provenance": dict(row.provenance)}


def _examples(rejected: Sequence[Rejected], reason: str) -> list[str]:
    found = [outcome.example for outcome in rejected if outcome.reason == reason]
    return [example[:EXAMPLE_LENGTH] for example in found[:EXAMPLES]]


def _by_operator(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Return the numbers of made and rejected rows by operator, level or method, the first that the rows have."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        provenance = outcome.provenance
        name = str(provenance.get("operator") or provenance.get("level") or provenance.get("method", ""))
        counts = found.setdefault(name, {"made": 0, "rejected": 0})
        counts["made" if isinstance(outcome, Made) else "rejected"] += 1
    return dict(sorted(found.items()))
