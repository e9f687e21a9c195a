"""What the driver hands to its workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray.actor import ActorHandle

from finetune_trainer.training.offer import Offer


@dataclass(frozen=True)
class StageWork:
    """One trained stage, as planned."""

    index: int
    zero: int
    flops_per_token: float
    peak_flops: float | None
    """FLOP/s of one worker's device; None where unknown."""
    rows_per_step: int | None = None
    """The global batch. None: the job's rows per forward pass and accumulation, times the workers at hand."""
    trained: int | None = None
    """Parameters with a gradient, as planned; None: unknown."""
    shards: int | None = None
    """In so many shards a stream is read. None: as many as there are workers."""


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
