"""Translates numbers of prepared training rows into numbers of rows in the user's data."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from finetune_trainer.data.preparation import training_rows
from finetune_trainer.stage_graph import directories
from finetune_trainer.training.context import StageContext


class RowNumbers:
    """Translates numbers of prepared rows into numbers of rows in the stage's sources.

    Prepared data is shuffled. If each of its rows is one row of the sources, the numbers count the rows of all sources,
    one source after the other. If rows were packed, split or dropped, and for streams, the numbers of the prepared rows
    are used.
    """

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self.pairs = False
        """Whether the rows are pairs that the stage generates in each round."""

    @property
    def data(self) -> str:
        """Description of the data that the numbers refer to, for a message."""
        if self.pairs:
            return f"pairs of the round of {self._context.where}, counted from 0"
        where = f"{self._context.where}.data"
        if self._sources is not None:
            return f"rows of {where}, counted from 0"
        return f"rows of the prepared {where}, counted from 0"

    def in_sources(self, rows: list[int]) -> list[int]:
        """Return the numbers in the sources of rows of the prepared data."""
        return rows if self._sources is None else [self._sources[row] for row in rows]

    @cached_property
    def _sources(self) -> list[int] | None:
        """The number in the sources of each prepared row; None if the numbers of the prepared rows are used."""
        report, context = self._context.data.report, self._context
        if self.pairs or report.streaming or report.packed_rows is not None or report.kept != report.rows:
            return None
        paths = {name: Path(value) for name, value in directories(context.run).items()}
        numbers = training_rows(context.spec, context.where, **paths)
        return numbers if len(numbers) == report.rows else None
