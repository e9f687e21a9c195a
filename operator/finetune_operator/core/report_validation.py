"""Validation of the reports of runs, which come from pods that run user code (pure).

A report is accepted as a whole or rejected. An accepted report has no control characters in its texts, no number that
the API server cannot store, and no stage that the job does not have.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from finetune_api.report import AttemptReport

Json = dict[str, Any]
LARGEST_NUMBER = 2**53
"""JSON readers may round integers above it."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """Return the text with control characters (except newline and tab), bidirectional marks and surrogates replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def read_report(text: str | bytes) -> AttemptReport | None:
    """Return the report in a JSON text, or None if the text is no valid report."""
    try:
        report = AttemptReport.model_validate_json(text, strict=False)
    except (ValidationError, ValueError):
        return None
    return report if all(abs(number) <= LARGEST_NUMBER for number in _integers(report.to_json())) else None


def fits(report: AttemptReport, spec: Json) -> bool:
    """Whether a report refers only to stages that the job has."""
    stages = len(spec.get("stages") or [])
    indices = [report.current, report.checkpoint.stage if report.checkpoint else None]
    known = all(index is None or 0 <= index < stages for index in indices)
    return known and len(report.stages) in (0, stages)


def cleaned(value: Any) -> Any:
    """Return a JSON value with `clean` applied to all its texts, keys included."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(name): cleaned(item) for name, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def _integers(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [number for item in items for number in _integers(item)]
