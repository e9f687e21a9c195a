"""Numbers of training rows as a user can look them up."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from finetune_trainer.data.preparation import training_rows
from finetune_trainer.stage_graph import directories
from finetune_trainer.training.context import StageContext


class RowNumbers:
    """Translates rows of prepared data into rows of the stage's sources.

    Prepared data is shuffled. Where each of its rows is one row of the sources, their numbers are those in the sources,
    one source after the other. Where rows were packed, split or dropped, and in streams, they are the prepared rows'
    own.
    """

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self.pairs = False
        """Whether the rows are pairs that the stage makes itself, round by round."""

    @property
    def data(self) -> str:
        """What the numbers count, for a message."""
        if self.pairs:
            return f"pairs of the round of {self._context.where}, counted from 0"
        where = f"{self._context.where}.data"
        if self._sources is not None:
            return f"rows of {where}, counted from 0"
        return f"rows of the prepared {where}, counted from 0"

    def of(self, rows: list[int]) -> list[int]:
        """Return the numbers that people know these rows of the prepared data by."""
        return rows if self._sources is None else [self._sources[row] for row in rows]

    @cached_property
    def _sources(self) -> list[int] | None:
        """For each prepared row its number in the sources; None where there is no such number."""
        report, context = self._context.data.report, self._context
        if self.pairs or report.streaming or report.packed_rows is not None or report.kept != report.rows:
            return None
        places = {name: Path(value) for name, value in directories(context.run).items()}
        found = training_rows(context.spec, context.where, **places)
        return found if len(found) == report.rows else None
