"""Fences off earlier attempts: once a later attempt of a job has begun, an earlier one saves nothing.

A node that the cluster has given up may still be alive behind a network partition and continue to train. `run.json`
contains the number of the newest attempt, so every worker reads it before it saves. A save between that check and the
start of a later attempt does no harm: both attempts resume from the same checkpoint and reach the same state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.errors import Interrupted
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.storage.filesystem import Storage


def attempt_of(run: dict[str, Any]) -> int:
    """Return the number of the newest attempt in the content of `run.json`."""
    return int(run.get("attempt", 1))


@dataclass(frozen=True)
class AttemptFence:
    """The fence of one attempt; `attempt` is its fencing token."""

    storage: Storage
    attempt: int

    def check(self) -> None:
        """Check that this attempt is still the newest.

        Raises:
            Interrupted: a later attempt has begun.
        """
        try:
            newest = attempt_of(json.loads(self.storage.read_text(RUN_CONFIG)))
        except FileNotFoundError:
            return
        if newest > self.attempt:
            raise Interrupted(f"attempt {newest} has taken over from attempt {self.attempt}, which saves no more")
