"""One trained stage as it was planned: what the driver hands to the workers about it."""

from __future__ import annotations

from dataclasses import dataclass


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
