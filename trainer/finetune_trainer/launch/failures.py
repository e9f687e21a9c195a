"""What an ended worker group's failure means, and whether to try again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ray.exceptions import OutOfMemoryError as HostOutOfMemoryError
from ray.train import TrainingFailedError
from torch import OutOfMemoryError as DeviceOutOfMemoryError

from finetune_api.device_faults import FaultKind, Found, device_fault
from finetune_api.problems import Problem
from finetune_trainer.errors import GateNotPassed, Interrupted, UserError
from finetune_trainer.launch.fault_place import node_of


class Kind(Enum):
    """Classes of failure, most telling first: one worker's word on the cause outweighs the others' broken pipes."""

    USER = "user error"
    GATE = "gate not passed"
    INTERRUPTED = "interrupted"
    OUT_OF_MEMORY = "out of memory"
    GPU = "GPU fault"
    BUG = "unexpected error"
    LOST = "worker lost"


# Raised again by the same code on the same data: trying again would only waste the machines.
_DETERMINISTIC = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError, NameError,
                  NotImplementedError)  # fmt: skip
_OF_FAULTS = {
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
"""The driver does not try a broken GPU (`Kind.GPU`) again, because its pods stay where they are.

The operator starts the next attempt on another node.
"""


@dataclass(frozen=True)
class Failure:
    """A classified failure. `error` is the worker's own exception, `text` all of it for a log."""

    kind: Kind
    error: BaseException
    text: str
    advice: str = ""
    """What to do about it, where that is known."""
    node: str | None = None
    """Name of the node on which a GPU fault happened, where that is known."""

    @property
    def retryable(self) -> bool:
        return self.kind is Kind.LOST


def classify(error: TrainingFailedError | HostOutOfMemoryError) -> Failure:
    """The failure that explains a worker group's end best."""
    causes = list(_causes(error))
    order = list(Kind)
    kind, cause = min(((_kind(cause), cause) for cause in causes), key=lambda pair: order.index(pair[0]))
    found = None if isinstance(cause, (UserError, GateNotPassed, Interrupted)) else _device_fault(cause)
    return Failure(kind, cause, str(error)) if found is None else _with_fault(kind, cause, str(error), found)


def _with_fault(kind: Kind, cause: BaseException, text: str, found: Found) -> Failure:
    """Say the fault once more in the last line: Ray shortens the workers' words, and a report keeps their end."""
    node = node_of(cause)
    line = f"{found.fault.kind.value}{f' on node {node}' if node else ''}: {found.line}"
    if kind is Kind.USER:
        cause = UserError([Problem("", f"{line}. {found.fault.advice}")])
    return Failure(kind, cause, f"{text}\n{line}", found.fault.advice, node)


def _device_fault(error: BaseException) -> Found | None:
    return device_fault(f"{type(error).__name__}: {error}")


def _kind(error: BaseException) -> Kind:
    if isinstance(error, UserError):
        return Kind.USER
    if isinstance(error, GateNotPassed):
        return Kind.GATE
    if isinstance(error, Interrupted):
        return Kind.INTERRUPTED
    if isinstance(error, (DeviceOutOfMemoryError, HostOutOfMemoryError, MemoryError)):
        return Kind.OUT_OF_MEMORY
    found = _device_fault(error)
    if found is not None:
        return _OF_FAULTS[found.fault.kind]
    return Kind.BUG if isinstance(error, _DETERMINISTIC) else Kind.LOST


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The workers' own exceptions, unwrapped from Ray's; the error itself where there are none."""
    failures: Iterable[BaseException] = getattr(error, "worker_failures", {}).values()
    found = False
    for failure in failures:
        found = True
        yield getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
    if not found:
        yield error
