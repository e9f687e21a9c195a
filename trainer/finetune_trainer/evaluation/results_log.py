"""Store evaluation rows batch by batch, so that an interrupted evaluation resumes without repeating them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from finetune_trainer.evaluation.scores import Row
from finetune_trainer.layout import StageLayout
from finetune_trainer.storage.filesystem import Storage


class ResultsLog:
    """The evaluated rows of one model. Each batch is a separate file, since stores such as S3 can't append.

    Args:
        keys: each row's `EvalRow.key` by its number. Rows that were evaluated before the data changed are ignored.
    """

    def __init__(self, storage: Storage, layout: StageLayout, model: str, keys: Mapping[int, str]) -> None:
        self.storage, self.keys = storage, keys
        self.parts, self.whole = layout.answer_parts(model), layout.answers(model)

    @property
    def complete(self) -> bool:
        """Return whether one file holds every row."""
        return self.storage.exists(self.whole) and len(self.known()) == len(self.keys)

    def known(self) -> dict[int, Row]:
        """Return the stored rows by number."""
        whole = [self.whole] if self.storage.exists(self.whole) else []
        names = [*whole, *(f"{self.parts}/{name}" for name in self.storage.names(self.parts))]
        lines = (line for name in names for line in self.storage.read_text(name).splitlines())
        return {row["row"]: row for row in map(json.loads, lines) if self._is_same(row)}

    def _is_same(self, row: Row) -> bool:
        """Return whether a stored row belongs to these rows; rows of earlier versions have no key and are accepted."""
        return row["row"] in self.keys and row.get("key") in (None, self.keys[row["row"]])

    def add(self, rows: Sequence[Row]) -> None:
        """Store one batch."""
        self.storage.write_text(f"{self.parts}/{rows[0]['row']:08d}.jsonl", _lines(rows))

    def finish(self, rows: Sequence[Row]) -> None:
        """Store all rows in one file and delete the files of batches."""
        self.storage.write_text(self.whole, _lines(rows))
        self.storage.delete(self.parts)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
