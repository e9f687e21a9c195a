"""Classifies the failure of a worker group and decides whether another attempt may succeed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ray.exceptions import OutOfMemoryError as HostOutOfMemoryError
from ray.train import TrainingFailedError
from torch import OutOfMemoryError as DeviceOutOfMemoryError
from torch.distributed import DistError

from finetune_api.device_faults import FaultKind, Found, device_fault
from finetune_api.problems import Problem
from finetune_api.ray_messages import RAY_FIELD
from finetune_trainer.errors import GateNotPassed, Interrupted, UserError, WorkersMissing
from finetune_trainer.launch.fault_location import node_of
from finetune_trainer.storage.retry import is_transient
from finetune_trainer.training.dropped_steps import RolledBack


class Kind(Enum):
    """Kinds of failure, most specific first: the cause on one worker outranks broken connections on the others."""

    USER = "user error"
    GATE = "gate not passed"
    INTERRUPTED = "interrupted"
    ROLLED_BACK = "bad numbers"
    OUT_OF_MEMORY = "out of memory"
    GPU = "GPU fault"
    BUG = "unexpected error"
    ERROR = "error"
    """May succeed in another attempt, unless the same error has occurred twice in a row."""
    STALLED = "stalled"
    """The workers made no progress for too long, and the driver has killed them."""
    LOST = "worker lost"


# The same code raises these again on the same data, so a retry would only waste machine time.
_DETERMINISTIC = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError, NameError,
                  NotImplementedError)  # fmt: skip
_KIND_OF_FAULT = {
    FaultKind.GPU: Kind.GPU,
    FaultKind.TOOLCHAIN: Kind.USER,
    FaultKind.DRIVER: Kind.USER,
    FaultKind.ARCHITECTURE: Kind.USER,
    FaultKind.PINNED_MEMORY: Kind.USER,
    FaultKind.DEVICE_ASSERT: Kind.BUG,
    FaultKind.DEVICE_MEMORY: Kind.OUT_OF_MEMORY,
    FaultKind.SHARED_MEMORY: Kind.OUT_OF_MEMORY,
    FaultKind.HOST_MEMORY: Kind.OUT_OF_MEMORY,
    FaultKind.ILLEGAL_ACCESS: Kind.LOST,
    FaultKind.NCCL_TIMEOUT: Kind.LOST,
    FaultKind.NCCL_SYSTEM: Kind.LOST,
}
"""The driver does not retry on a broken GPU (`Kind.GPU`), because its pods stay on their nodes.

The operator starts the next attempt on another node.
"""
_CONNECTION_ERROR = re.compile(
    r"gloo|nccl|c10d|process ?group|rendezvous|connection (closed|reset|refused|aborted)|broken pipe|"
    r"socket|timed? ?out|uncorrectable ecc|device unavailable",
    re.IGNORECASE,
)
"""Matches messages of RuntimeErrors that mean a failure of another worker, the network or the machine, not the code."""
_VARIABLE_PARTS = re.compile(r"0x[0-9a-f]+|/tmp/\S+|\d+(\.\d+)?", re.IGNORECASE)
"""Matches what differs between two messages of the same error: addresses, temporary files, numbers."""
_STEP_ATTRIBUTE = "finetune_step"

StageStep = tuple[int, int]
"""Index of a stage, and the optimizer steps that it has done."""


@dataclass(frozen=True)
class Failure:
    """A classified failure."""

    kind: Kind
    error: BaseException
    """The exception of the worker that explains the failure best."""
    text: str
    """The full text of the failure, for a log."""
    advice: str = ""
    """The remedy, if one is known."""
    node: str | None = None
    """Name of the node of a GPU fault, or of the worker that was behind in a stall. None if unknown."""
    elsewhere: bool = False
    """Whether the next attempt should run on other nodes, so that this attempt's driver does not retry."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed."""
        return self.kind in (Kind.ERROR, Kind.LOST, Kind.STALLED, Kind.ROLLED_BACK) and not self.elsewhere

    @property
    def counts(self) -> bool:
        """Whether the failure uses up a retry. Rollbacks have their own limit (`training.dropped_steps`)."""
        return self.kind is not Kind.ROLLED_BACK

    @property
    def line(self) -> str:
        """The failure in one line."""
        return str(self.error) if self.kind is Kind.ROLLED_BACK else last_line(self.text)

    @property
    def signature(self) -> tuple[str, str, StageStep | None] | None:
        """The error's class, its message without variable parts, and its step. Equal for repetitions of one error.

        None for failures that come from outside of the workers, whose repetition proves nothing.
        """
        if self.kind is not Kind.ERROR:
            return None
        return type(self.error).__qualname__, _VARIABLE_PARTS.sub("#", str(self.error)), step_of(self.error)


def classify(error: TrainingFailedError | HostOutOfMemoryError) -> Failure:
    """Return the failure that explains best why a worker group ended."""
    causes = list(_causes(error))
    order = list(Kind)
    kind, cause = min(((_kind(cause), cause) for cause in causes), key=lambda pair: order.index(pair[0]))
    found = None if isinstance(cause, (UserError, GateNotPassed, Interrupted, RolledBack)) else _device_fault(cause)
    return Failure(kind, cause, str(error)) if found is None else _with_fault(kind, cause, str(error), found)


def _with_fault(kind: Kind, cause: BaseException, text: str, found: Found) -> Failure:
    """Repeat the fault in the last line: Ray truncates the workers' messages, and a report keeps the last line."""
    node = node_of(cause)
    line = f"{found.fault.kind.value}{f' on node {node}' if node else ''}: {found.line}"
    if kind is Kind.USER:
        cause = UserError([Problem("", f"{line}. {found.fault.advice}")])
    return Failure(kind, cause, f"{text}\n{line}", found.fault.advice, node)


def _device_fault(error: BaseException) -> Found | None:
    return device_fault(f"{type(error).__name__}: {error}")


@contextmanager
def errors_with_step(stage: int, trainer: Any = None) -> Iterator[None]:
    """Add the stage and the trainer's step to an error that leaves this block."""
    try:
        yield
    except Exception as error:
        setattr(error, _STEP_ATTRIBUTE, (stage, trainer.state.global_step if trainer is not None else 0))
        raise


def step_of(error: BaseException) -> StageStep | None:
    """Return the stage and step that `errors_with_step` has added; they survive Ray's pickling."""
    return getattr(error, _STEP_ATTRIBUTE, None)


def last_line(text: str) -> str:
    """Return the last line of a text that is neither blank nor one of the fields that Ray prints for an actor."""
    lines = [line for line in text.strip().splitlines() if line.strip() and not RAY_FIELD.match(line)]
    return lines[-1].strip()[:300] if lines else ""


def _kind(error: BaseException) -> Kind:
    if isinstance(error, UserError):
        return Kind.USER
    if isinstance(error, GateNotPassed):
        return Kind.GATE
    if isinstance(error, Interrupted):
        return Kind.INTERRUPTED
    if isinstance(error, RolledBack):
        return Kind.ROLLED_BACK
    if isinstance(error, (DeviceOutOfMemoryError, HostOutOfMemoryError, MemoryError)):
        return Kind.OUT_OF_MEMORY
    if isinstance(error, WorkersMissing):
        return Kind.LOST
    found = _device_fault(error)
    if found is not None:
        return _KIND_OF_FAULT[found.fault.kind]
    if isinstance(error, _DETERMINISTIC):
        return Kind.BUG
    return Kind.LOST if _is_infrastructure(error) else Kind.ERROR


def _is_infrastructure(error: BaseException) -> bool:
    """Whether a worker, the network, a storage or a machine has failed, and not the code that runs on it."""
    if not isinstance(error, Exception) or type(error).__module__.partition(".")[0] == "ray":
        return True
    return isinstance(error, DistError) or is_transient(error) or bool(_CONNECTION_ERROR.search(str(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the workers' exceptions, unwrapped from Ray's; the error itself if there are none."""
    failures: Iterable[BaseException] = getattr(error, "worker_failures", {}).values()
    found = False
    for failure in failures:
        found = True
        yield getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
    if not found:
        yield error
