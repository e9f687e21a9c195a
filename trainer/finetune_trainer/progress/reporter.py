"""What a run tells the outside world, and the interface by which it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """One step of one stage.

    Rates are of the whole job, all workers together. None means: not known.
    """

    stage: int
    """Index of the stage, from 0."""
    stages: int
    """Number of stages."""
    title: str
    """The stage's name."""
    step: int
    """Optimizer steps done."""
    total: int
    """Optimizer steps in all."""
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    """Tokens trained on since the stage's start, padding left out."""
    samples: int | None = None
    """Rows trained on since the stage's start."""
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak is unknown."""
    memory: int | None = None
    """Peak bytes since the stage began: of tensors on an accelerator, else resident of the worker's process."""
    memory_reserved: int | None = None
    """Peak bytes that torch's allocator held on the accelerator, what it keeps for later included."""
    memory_context: int | None = None
    """Bytes of the CUDA context, which torch does not count."""
    memory_nccl: int | None = None
    """Bytes that were allocated on the device outside torch since: NCCL's buffers, and kernels loaded later."""
    seconds: float | None = None
    """Seconds this stage has trained, earlier attempts included."""
    eta: float | None = None
    """Seconds to the stage's end."""
    step_seconds_median: float | None = None
    """Seconds that a worker's own part of a step takes (`training.step_times`): the median of all workers."""
    step_seconds_max: float | None = None
    """As before: the slowest worker's."""
    slow_node: str | None = None
    """Name of a node whose workers are much slower than the others'."""
    slow_factor: float | None = None
    """How many times as long they take."""
    metrics: dict[str, float] | None = None
    """What the stage adds: `eval_loss`, `rewards/accuracies`, …"""

    def to_json(self) -> dict[str, Any]:
        """The known fields."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Reporter(Protocol):
    """Told what happens, in order, from the driver's process. Implementations must not raise and not block for long."""

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        """A stage begins or, after a failure, begins again; `message` says how («resumed at step 40»)."""

    def log(self, message: str) -> None:
        """A line for people."""

    def waiting(self, message: str) -> None:
        """What storage is waited for; empty: it answers again. From any thread."""

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        """How the GPUs of several nodes reach each other; `warning` may be empty."""

    def placing(self, message: str) -> None:
        """The workers wait for room on Ray's nodes; empty: they have it."""

    def restarting(self, message: str) -> None:
        """The workers have failed, and start again from the last checkpoint; `message` says why."""

    def stalled(self, message: str, node: str | None) -> None:
        """The workers make no progress; `message` says which one is behind, `node` is the name of its node."""

    def progress(self, progress: Progress) -> None:
        """The newest step. Steps may be left out."""

    def checkpoint_saved(self, index: int, step: int, place: str) -> None:
        """A stage has a complete checkpoint at `place`."""

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        """A stage is done and its result is at `result`."""

    def close(self) -> None:
        """No more calls follow."""


class LineReporter(ABC):
    """What reporters for people say in a line of their log."""

    @abstractmethod
    def log(self, message: str) -> None: ...

    def waiting(self, message: str) -> None:
        self.log(f"waiting for storage: {message}" if message else "storage answers again")

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        self.log(f"NCCL: {words}")
        if warning:
            self.log(f"warning: {warning}")

    def placing(self, message: str) -> None:
        self.log(message or "there is room for the workers now")

    def restarting(self, message: str) -> None:
        self.log(f"{message}; starting again from the last checkpoint")

    def stalled(self, message: str, node: str | None) -> None:
        self.log(f"stalled: {message}")
