"""The planned work of one stage, which the driver sends to the workers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageWork:
    """The planned work of one stage."""

    index: int
    zero: int
    """ZeRO stage, 0 to 3."""
    flops_per_token: float
    peak_flops: float | None
    """Peak FLOP/s of one worker's device; None if unknown."""
    rows_per_step: int | None = None
    """Global batch size. None: the job's batch size per device and accumulation steps, times the world size."""
    trained: int | None = None
    """Parameters with a gradient, as planned; None if unknown."""
    shards: int | None = None
    """Number of shards in which a stream is read. None: the world size."""
