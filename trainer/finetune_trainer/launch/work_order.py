"""The work order that the driver sends to its workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.actor import ActorHandle

from finetune_trainer.launch.sharing.records import Offer
from finetune_trainer.training.stage_work import StageWork


@dataclass(frozen=True)
class WorkOrder:
    """The stages that the workers still have to train, in order."""

    run: str
    """The RunConfig as JSON."""
    stages: list[StageWork]
    accelerator: bool
    threads: int
    """CPU threads per worker."""
    channel: ActorHandle[Any]
    offer: Offer = field(default_factory=Offer)
    """Directories that the workers' nodes fetch first."""
