"""Summarize a data report in one line."""

from __future__ import annotations

from finetune_trainer.data.report import DataReport
from finetune_trainer.progress.formatting import count, percent


def data_line(report: DataReport) -> str:
    """Return a line that says what is trained on, and what was truncated or dropped."""
    if report.streaming:
        return "data is read while training"
    parts = [f"{count(report.kept)} of {count(report.rows)} rows", f"{count(report.tokens)} tokens"]
    if report.packed_rows is not None:
        parts.append(f"packed into {count(report.packed_rows)} rows ({percent(report.packing_efficiency or 0)} full)")
    if report.truncated_examples:
        parts.append(f"{count(report.truncated_examples)} cut by {count(report.truncated_tokens)} tokens")
    parts += [f"{count(number)} dropped ({reason})" for reason, number in report.dropped.items() if number]
    parts += [f"{count(number)} with {note}" for note, number in report.notes.items() if number]
    return ", ".join(parts) + (" · prepared before" if report.cached else "")
