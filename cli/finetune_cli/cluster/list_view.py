"""`finetune status`: table of jobs with the columns of `kubectl get ftj`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from finetune_cli.cluster.reading import phase_of, seconds_between, short_duration, status_of
from finetune_trainer.progress.formatting import clean

Json = dict[str, Any]
COLUMNS = ("stage", "step", "loss", "eta", "attempt")
COLOURS = {
    "Succeeded": "green",
    "Failed": "bold red",
    "Running": "cyan",
    "Suspended": "yellow",
    "Stopping": "yellow",
    "Retrying": "yellow",
}


def list_table(jobs: list[Json], now: datetime, *, all_namespaces: bool = False) -> Table:
    """Return a table with one row per job."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    names = ("namespace", "name") if all_namespaces else ("name",)
    for heading in (*names, "phase", *COLUMNS, "age"):
        table.add_column(heading.upper(), no_wrap=True)
    for job in jobs:
        metadata, status = job["metadata"], status_of(job)
        phase = phase_of(job)
        table.add_row(
            *(Text(clean(metadata[name])) for name in names),
            Text(phase, COLOURS.get(phase, "")),
            *(Text(clean(str(status.get(name, "")))) for name in COLUMNS),
            short_duration(seconds_between(metadata.get("creationTimestamp"), None, now)),
        )
    return table
