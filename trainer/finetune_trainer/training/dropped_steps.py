"""The steps of a stage whose updates are skipped after a rollback, kept in storage between attempts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from finetune_trainer.storage.checkpoints import CheckpointStore

SHOWN = 32
MOST = 3
"""Maximum number of rollbacks to one checkpoint. If they do not help, the job's data or settings are wrong."""


class RolledBack(Exception):
    """A stage was rolled back to its last checkpoint because of bad numbers; a new worker group resumes from it."""


@dataclass(frozen=True)
class Dropped:
    """A step with bad numbers."""

    step: int
    """Optimizer steps done before."""
    rows: list[int]
    """Numbers of its rows."""
    data: str
    """Description of the data that the numbers refer to."""
    why: str

    @property
    def message(self) -> str:
        """Description of the step for users, whose steps count from 1."""
        return f"step {self.step + 1}: {self.why}; {self.data}: {format_rows(self.rows)}"


def format_rows(rows: list[int]) -> str:
    """Return row numbers for a message, at most `SHOWN` of them."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{', '.join(map(str, rows[:SHOWN]))}{more}"


class DroppedSteps:
    """The file `dropped.json` of a stage.

    Args:
        store: checkpoints of the stage.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._records = self._read()

    @property
    def steps(self) -> set[int]:
        """The steps to skip."""
        return {int(record["step"]) for record in self._records}

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, or 0 if there is none."""
        manifest = self._store.newest()
        return manifest.step if manifest else 0

    def since(self, checkpoint: int) -> list[dict[str, Any]]:
        """Return the records of rollbacks to a checkpoint."""
        return [record for record in self._records if record["checkpoint"] == checkpoint]

    def exhausted(self, checkpoint: int) -> bool:
        """Whether the maximum number of rollbacks to a checkpoint is reached."""
        return len(self.since(checkpoint)) >= MOST

    def describe(self, checkpoint: int) -> str:
        """Return the steps that the rollbacks to a checkpoint have skipped, for a message."""
        records = self.since(checkpoint)
        return "; ".join(f"step {one['step'] + 1} with the rows {format_rows(one['rows'])}" for one in records)

    def add(self, dropped: Dropped, checkpoint: int) -> None:
        """Skip a step from now on. Rank 0 calls it."""
        self._records.append({**asdict(dropped), "checkpoint": checkpoint})
        self._store.storage.write_text(self._store.layout.dropped, json.dumps(self._records, indent=1))

    def _read(self) -> list[dict[str, Any]]:
        try:
            records: list[dict[str, Any]] = json.loads(self._store.storage.read_text(self._store.layout.dropped))
        except FileNotFoundError:
            return []
        return records
