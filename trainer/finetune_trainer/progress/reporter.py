"""The progress of a run and the interface of its reporters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """The progress of one stage after a step. Rates are totals over all workers. None means unknown."""

    stage: int
    """Index of the stage, from 0."""
    stages: int
    """Number of stages."""
    title: str
    """Name of the stage."""
    step: int
    """Optimizer steps done."""
    total: int
    """Total number of optimizer steps."""
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    """Tokens trained on since the stage's start, without padding."""
    samples: int | None = None
    """Rows trained on since the stage's start."""
    tokens_per_second: float | None = None
    samples_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; None if the peak of the device is unknown."""
    memory: int | None = None
    """Peak bytes since the stage began: of tensors on an accelerator, or else resident memory of the worker."""
    memory_reserved: int | None = None
    """Peak bytes reserved by torch's allocator on the accelerator."""
    memory_context: int | None = None
    """Bytes of the CUDA context, which torch does not count."""
    memory_nccl: int | None = None
    """Bytes allocated on the device outside torch: NCCL's buffers, and kernels that were loaded later."""
    seconds: float | None = None
    """Seconds of training in this stage, including earlier attempts."""
    eta: float | None = None
    """Seconds until the end of the stage."""
    step_seconds_median: float | None = None
    """Step time of a worker without waits for others (`training.step_times`) in seconds: median of all workers."""
    step_seconds_max: float | None = None
    """The same: maximum of all workers."""
    slow_node: str | None = None
    """Name of a node whose workers are much slower than those of the other nodes."""
    slow_factor: float | None = None
    """Ratio of their step time to that of the other nodes."""
    metrics: dict[str, float] | None = None
    """Further metrics of the stage, such as `eval_loss` or `rewards/accuracies`."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Reporter(Protocol):
    """Receives the events of a run, in order, in the driver. Implementations must not raise and not block for long."""

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        """Report that a stage begins, or begins again after a failure; `message` describes its workers and plan."""

    def log(self, message: str) -> None:
        """Report a log line."""

    def waiting(self, message: str) -> None:
        """Report a wait for storage. An empty message means that storage responds again. Called from any thread."""

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        """Report the transport between the GPUs of several nodes; `warning` may be empty."""

    def placing(self, message: str) -> None:
        """Report that Ray has no room for the workers. An empty message means that it has room again."""

    def restarting(self, message: str) -> None:
        """Report that the workers have failed and restart from the last checkpoint; `message` is the reason."""

    def stalled(self, message: str, node: str | None) -> None:
        """Report a stall; `message` names the worker that is behind, and `node` is the name of its node."""

    def progress(self, progress: Progress) -> None:
        """Report the newest step. Steps may be omitted."""

    def checkpoint_saved(self, index: int, step: int, path: str) -> None:
        """Report a complete checkpoint of a stage."""

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        """Report that a stage is done; `result` is the path of its result."""

    def close(self) -> None:
        """Release resources. No more calls follow."""


class LineReporter(ABC):
    """The part of a reporter that formats events as log lines."""

    @abstractmethod
    def log(self, message: str) -> None: ...

    def waiting(self, message: str) -> None:
        self.log(f"waiting for storage: {message}" if message else "storage responds again")

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        self.log(f"NCCL: {words}")
        if warning:
            self.log(f"warning: {warning}")

    def placing(self, message: str) -> None:
        self.log(message or "there is room for the workers now")

    def restarting(self, message: str) -> None:
        self.log(f"{message}; restarting from the last checkpoint")

    def stalled(self, message: str, node: str | None) -> None:
        self.log(f"stalled: {message}")
