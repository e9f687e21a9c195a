"""`finetune status NAME`: view of one job with its progress, stages, conditions and attempts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli.cluster.list_view import COLOURS
from finetune_cli.cluster.reading import (
    conditions_of,
    hint_of,
    is_moving,
    phase_of,
    progress_of,
    seconds_between,
    short_duration,
    status_of,
)
from finetune_trainer.progress.console_reporter import BAR_MAX, BAR_MIN, fit
from finetune_trainer.progress.formatting import clean, duration, named_metrics, step_parts
from finetune_trainer.progress.reporter import Progress

Json = dict[str, Any]
_GLYPHS = {"Succeeded": ("✓", "green"), "Running": ("●", "cyan"), "Pending": ("○", "dim")}
_STOPPED = ("■", "yellow")
_INDENT = (0, 0, 0, 2)


class JobView:
    """View of a job at a point in time. `note` is a line below it."""

    def __init__(self, job: Json, now: datetime, note: str = "") -> None:
        self.job, self.now, self.note = job, now, note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._head()
        progress = progress_of(self.job)
        if progress is not None:
            yield Padding(ProgressLine(progress), _INDENT)
        yield from self._facts()
        yield from self._sections()
        if self.note:
            yield Text(clean(self.note), "yellow")

    def _head(self) -> Text:
        metadata, status, phase = self.job["metadata"], status_of(self.job), phase_of(self.job)
        parts = [Text(clean(metadata["name"]), "bold"), Text(phase, COLOURS.get(phase, "bold"))]
        if status.get("stage"):
            parts.append(Text(f"stage {clean(str(status['stage']))}"))
        if status.get("attempt"):
            parts.append(Text(f"attempt {status['attempt']}"))
        age = short_duration(seconds_between(metadata.get("creationTimestamp"), None, self.now))
        parts.append(Text(f"namespace {clean(metadata.get('namespace', ''))}, {age} old", "dim"))
        return Text("  ").join(parts)

    def _facts(self) -> Iterator[RenderableType]:
        status = status_of(self.job)
        hint = hint_of(self.job) if not status.get("failure") else ""
        if hint:
            yield Padding(Text(hint, "yellow"), _INDENT)
        last = status.get("lastCheckpoint")
        if last:
            where = f"step {last.get('step')} of stage {last.get('stage', 0) + 1}, {last.get('uri', '')}"
            yield Padding(Text.assemble(("checkpoint  ", "dim"), clean(where)), _INDENT)
        failure = status.get("failure")
        if failure:
            yield Padding(_failure(failure), _INDENT)

    def _sections(self) -> Iterator[RenderableType]:
        status = status_of(self.job)
        tables = {
            "Stages": _stages(status.get("stages") or [], self.now if is_moving(self.job) else None),
            "Conditions": _conditions(conditions_of(self.job), self.now),
            "Attempts": _attempts(status.get("attempts") or [], self.now),
        }
        for title, table in tables.items():
            if table.row_count:
                yield Group(Text(f"\n{title}", "bold"), Padding(table, _INDENT))


class ProgressLine:
    """Progress bar of the running stage, followed by what fits: step, loss, ETA, tokens/s, learning rate."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = fit(list(step_parts(self.progress)), options.max_width - BAR_MIN - 2)
        width = min(max(options.max_width - len(text) - 2, 1), BAR_MAX)
        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(max(self.progress.total, 1), self.progress.step, width=width)
        grid.add_row(bar, Text(text, no_wrap=True))
        yield grid


def _failure(failure: Json) -> Text:
    """Return the last failure: reason, location, message and the end of the traceback of the driver."""
    labels = {"pod": "pod", "node": "node", "exitCode": "exit code", "attempt": "attempt"}
    parts = [f"{label} {failure[name]}" for name, label in labels.items() if failure.get(name) is not None]
    location = f" ({clean(', '.join(parts))})" if parts else ""
    return Text.assemble(
        ("failure  ", "dim"),
        (clean(str(failure.get("reason", ""))), "bold red"),
        (location, "dim"),
        ("\n" + clean(str(failure["message"])) if failure.get("message") else ""),
        ("\n" + clean(str(failure["traceback"])) if failure.get("traceback") else "", "dim"),
    )


def _stages(stages: list[Json], now: datetime | None) -> Table:
    """Return the table of stages. `now` is None if the job is not running."""
    table = _table("", "stage", "took", "metrics", "result")
    for number, stage in enumerate(stages, 1):
        state = str(stage.get("state", ""))
        stopped = state == "Running" and now is None
        glyph, colour = _STOPPED if stopped else _GLYPHS.get(state, ("", ""))
        took = None if stopped else seconds_between(stage.get("startTime"), stage.get("completionTime"), now)
        table.add_row(
            Text(glyph, colour),
            Text(f"{number} {clean(str(stage.get('name', '')))}", no_wrap=True),
            Text(duration(took) if took is not None else "stopped" if stopped else clean(state.lower()), no_wrap=True),
            Text(named_metrics(stage.get("metrics") or {})),
            Text(clean(str(stage.get("result") or "")), "dim"),
        )
    return table


def _conditions(conditions: list[Json], now: datetime) -> Table:
    table = _table("condition", "", "reason", "for", "message")
    for item in conditions:
        since = short_duration(seconds_between(item.get("lastTransitionTime"), None, now))
        values = (item.get(name, "") for name in ("type", "status", "reason"))
        first, _, more = clean(str(item.get("message") or "")).partition("\n")
        message = Text(f"{first} ..." if more else first)  # the failure shows the complete message
        table.add_row(*(Text(clean(str(value)), no_wrap=True) for value in values), since, message)
    return table


def _attempts(attempts: list[Json], now: datetime) -> Table:
    table = _table("attempt", "took", "ended", "message")
    for item in attempts:
        took = seconds_between(item.get("startTime"), item.get("endTime"), now)
        message = clean(str(item.get("message") or "")).strip().split("\n")
        table.add_row(
            str(item.get("number", "")),
            Text(duration(took) if took is not None else "", no_wrap=True),
            Text(clean(str(item.get("reason", "") if "endTime" in item else "running")), no_wrap=True),
            Text(message[-1]),  # the failure shows the complete message
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in headings:
        table.add_column(heading)
    return table
