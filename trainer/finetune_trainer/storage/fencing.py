"""An attempt's hold on its job's directory in storage: once a later attempt has begun, an earlier one saves nothing.

A node that the cluster has given up may still be alive, cut off, and train on. The number of the attempt that began
last stands in `run.json`, so whoever saves looks there first. What is written in between the look and the save can't do
harm: it is the state that the later attempt comes to by itself, for both go on from the same checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from finetune_trainer.errors import Interrupted
from finetune_trainer.layout import RUN_CONFIG
from finetune_trainer.storage.filesystem import Storage


def attempt_of(run: dict[str, Any]) -> int:
    """The attempt that began last, as its `run.json` tells."""
    return int(run.get("attempt", 1))


@dataclass(frozen=True)
class AttemptFence:
    """What attempt `attempt` may do in `storage`."""

    storage: Storage
    attempt: int

    def check(self) -> None:
        """Look whether this attempt is still the newest.

        Raises:
            Interrupted: a later one has begun.
        """
        try:
            newest = attempt_of(json.loads(self.storage.read_text(RUN_CONFIG)))
        except FileNotFoundError:
            return
        if newest > self.attempt:
            raise Interrupted(f"attempt {newest} has taken over from attempt {self.attempt}, which saves no more")
