"""What the driver hands to its workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray.actor import ActorHandle

from finetune_trainer.launch.sharing.records import Offer
from finetune_trainer.training.stage_work import StageWork


@dataclass(frozen=True)
class WorkOrder:
    """The stages that are still to be trained, in order, by the same workers."""

    run: str
    """The RunConfig as JSON."""
    stages: list[StageWork]
    accelerator: bool
    threads: int
    """CPU threads per worker."""
    channel: ActorHandle
    offer: Offer = field(default_factory=Offer)
    """What the workers' nodes fetch first."""
