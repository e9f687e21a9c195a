"""Describe the recognized format of each data source, for the job's log."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from finetune_api.data import DataSpec
from finetune_trainer.data.row_formats import Kind, reading
from finetune_trainer.data.sources import Located, join_row, locate, source_rows
from finetune_trainer.errors import UserError

ROWS = 20
"""Number of rows of a source that are inspected."""


def reading_notes(spec: DataSpec, kind: Kind, where: str, base_dir: Path) -> list[str]:
    """Return lines such as "d.sources[0]: reads Alpaca rows from columns `instruction` and `output`".

    Rows and files that can't be read are skipped here: `checks.inspect` reports them.

    Args:
        where: the spec's path, such as `stages[1].sft.data`.
    """
    return list(notes_of(locate(spec, where, base_dir)[0], spec, kind, where))


def notes_of(located: list[Located], spec: DataSpec, kind: Kind, where: str, streaming: bool = True) -> Iterator[str]:
    """Yield the lines of `reading_notes` for sources that have been located.

    Args:
        streaming: whether a hub dataset is read over the network and not from its local copy.
    """
    numbers = {id(source): index for index, source in enumerate(spec.sources)}
    for one in located if kind != "text" else []:
        path = f"{where}.sources[{numbers[id(one.source)]}]"
        yield from dict.fromkeys(f"{path}: {note}" for note in _notes(one, spec, kind, path, streaming))


def _notes(located: Located, spec: DataSpec, kind: Kind, path: str, streaming: bool) -> Iterator[str]:
    try:
        for row, _, _ in islice(source_rows(located, 0, streaming=streaming), ROWS):
            note = reading(join_row(row, located, path), spec, kind)
            if note is not None:
                yield note
    except (UserError, OSError, ValueError):
        return
