"""`finetune status`: print the status once, or update it until the job ends or Ctrl-C."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.live import Live

from finetune_cli.cluster.job_view import JobView
from finetune_cli.cluster.jobs import Jobs
from finetune_cli.cluster.list_view import list_table
from finetune_cli.cluster.reading import condition_of, has_ended, hint_of, phase_of, progress_of, status_of
from finetune_cli.cluster.watching import Objects
from finetune_trainer.progress.formatting import clean, step_parts

Json = dict[str, Any]
Form = Literal["json", "yaml"]
REFRESH_PER_SECOND = 2
WIDE = 1000
"""Table width without a terminal, so that nothing is wrapped."""


def show(jobs: Jobs, name: str | None, form: Form | None) -> None:
    """Print one job, or the list of jobs."""
    if form is not None:
        found = jobs.read(name) if name is not None else {"apiVersion": "v1", "kind": "List", "items": jobs.list()}
        print(dumped(found, form), end="")
        return
    console = console_for(sys.stdout)
    if name is not None:
        _print(console, JobView(jobs.read(name), _now()))
        return
    found_jobs = jobs.list()
    if found_jobs:
        _print(console, list_table(found_jobs, _now(), all_namespaces=jobs.namespace is None))
    else:
        where = f"namespace {jobs.namespace}" if jobs.namespace is not None else "any namespace"
        print(f"no jobs in {where}", file=sys.stderr)


def dumped(found: Json, form: Form) -> str:
    """Return an object as JSON or YAML, without `managedFields` (as kubectl does)."""
    items = found["items"] if found.get("kind") == "List" else [found]
    for item in items:
        item["metadata"].pop("managedFields", None)
    if form == "json":
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    import yaml

    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def watch_all(jobs: Jobs) -> None:
    """Show the list of jobs: a live view on a terminal, else one line per change. Does not return."""
    console = console_for(sys.stdout)
    if _is_live(console):
        _live(console, jobs, None, lambda found, note: _list_with(jobs, found, note))
        return
    shown: dict[tuple[str, str], str] = {}
    for found in jobs.changes(note=_stderr):
        for key, job in found.items():
            prefix = "/".join(key) if jobs.namespace is None else key[1]
            shown[key] = _tell(f"{prefix}: {summary(job)}", shown.get(key))
        for key in shown.keys() - found.keys():
            del shown[key]
            print(f"{key[1]}: deleted", flush=True)


def watch_one(jobs: Jobs, name: str) -> Json:
    """Show one job until it ends: a live view on a terminal, else one line per change. Return the ended job.

    Raises:
        UserError: the job does not exist, or was deleted.
    """
    jobs.read(name)
    console = console_for(sys.stdout)
    if _is_live(console):
        return _live(console, jobs, name, lambda found, note: JobView(next(iter(found.values())), _now(), note))
    shown = None
    for found in jobs.changes(name, note=_stderr):
        job = next(iter(_present(jobs, name, found).values()))
        shown = _tell(summary(job), shown)
        if has_ended(job):
            return job
    raise AssertionError("a watch without a deadline ends only with its job")


def summary(job: Json) -> str:
    """Return a job in one line: phase, stage, progress, and why it waits."""
    status, progress = status_of(job), progress_of(job)
    parts = [phase_of(job)]
    if status.get("stage"):
        parts.append(clean(str(status["stage"])))
    if progress is not None:
        parts += [text for _, text in step_parts(progress)]
    running = condition_of(job, "Running").get("status") == "True"
    hint = hint_of(job)
    return " · ".join([*parts, *([hint.replace("\n", " ")] if hint and not running else [])])


def console_for(stream: Any) -> Console:
    """Return a console for the stream. Without a terminal, tables are not wrapped."""
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=WIDE, soft_wrap=True)


def _print(console: Console, drawn: RenderableType) -> None:
    """Print once. Without a terminal, strip trailing spaces from table lines."""
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as captured:
        console.print(drawn)
    print("\n".join(line.rstrip() for line in captured.get().rstrip().split("\n")))


def _is_live(console: Console) -> bool:
    """Return whether the terminal supports live updates."""
    return console.is_terminal and not console.is_dumb_terminal


def _live(console: Console, jobs: Jobs, name: str | None, drawn: Callable[[Objects, str], RenderableType]) -> Json:
    """Update the view until the job of that name ends, and return it."""
    lost = ""

    def note(message: str) -> None:
        nonlocal lost
        lost = message

    changes = jobs.changes(name, note=note)
    found = _present(jobs, name, next(changes))
    with Live(console=console, get_renderable=lambda: drawn(found, lost), refresh_per_second=REFRESH_PER_SECOND):
        while name is None or not has_ended(next(iter(found.values()))):
            found = _present(jobs, name, next(changes))
    return next(iter(found.values()))


def _list_with(jobs: Jobs, found: Objects, note: str) -> RenderableType:
    rows = [found[key] for key in sorted(found)]
    table = list_table(rows, _now(), all_namespaces=jobs.namespace is None)
    table.caption, table.caption_justify = note or None, "left"
    return table


def _present(jobs: Jobs, name: str | None, found: Objects) -> Objects:
    """Return a copy of the objects. Raise UserError if the named job is missing."""
    if name is not None and not found:
        raise jobs.missing(name)
    return dict(found)


def _tell(text: str, before: str | None) -> str:
    if text != before:
        print(text, flush=True)
    return text


def _stderr(note: str) -> None:
    if note:
        print(note, file=sys.stderr, flush=True)


def _now() -> datetime:
    return datetime.now(UTC)
