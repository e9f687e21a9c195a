"""The steps of a stage whose updates are left out after a rollback, kept in storage from one attempt to the next."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from finetune_trainer.storage.checkpoints import CheckpointStore

SHOWN = 32
MOST = 3
"""Rollbacks to one checkpoint; where they don't help, the job's data or settings are wrong."""


class RolledBack(Exception):
    """Bad numbers sent a stage back to its last checkpoint; a new group of workers goes on from there."""


@dataclass(frozen=True)
class Dropped:
    """A step with bad numbers."""

    step: int
    """Optimizer steps done before it."""
    rows: list[int]
    """Numbers of its rows."""
    data: str
    """What the numbers count."""
    why: str

    @property
    def words(self) -> str:
        """The step for people, who count from 1."""
        return f"step {self.step + 1}: {self.why}; {self.data}: {shown(self.rows)}"


def shown(rows: list[int]) -> str:
    """Row numbers as a message shows them: the first ones of many."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{', '.join(map(str, rows[:SHOWN]))}{more}"


class DroppedSteps:
    """Reads and adds to a stage's `dropped.json`.

    Args:
        store: of the stage's checkpoints.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._records = self._read()

    @property
    def steps(self) -> set[int]:
        """The steps to leave out."""
        return {int(record["step"]) for record in self._records}

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint; 0 where there is none."""
        manifest = self._store.newest()
        return manifest.step if manifest else 0

    def since(self, checkpoint: int) -> list[dict[str, Any]]:
        """Return the records of rollbacks to that checkpoint."""
        return [record for record in self._records if record["checkpoint"] == checkpoint]

    def exhausted(self, checkpoint: int) -> bool:
        """Whether no further rollback to that checkpoint is of use."""
        return len(self.since(checkpoint)) >= MOST

    def told(self, checkpoint: int) -> str:
        """Return what the rollbacks to that checkpoint left out, for a message."""
        known = (
            Dropped(record["step"], record["rows"], record["data"], record["why"]) for record in self.since(checkpoint)
        )
        return "; ".join(f"step {one.step + 1} with the rows {shown(one.rows)}" for one in known)

    def add(self, dropped: Dropped, checkpoint: int) -> None:
        """Leave a step out from now on. The first worker calls it."""
        self._records.append({**asdict(dropped), "checkpoint": checkpoint})
        self._store.storage.write_text(self._store.layout.dropped, json.dumps(self._records, indent=1))

    def _read(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(self._store.storage.read_text(self._store.layout.dropped))
        except FileNotFoundError:
            return []
        return found
