"""What an ended worker group's failure means, and whether to try again."""

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
    """Classes of failure, most telling first: one worker's word on the cause outweighs the others' broken pipes."""

    USER = "user error"
    GATE = "gate not passed"
    INTERRUPTED = "interrupted"
    ROLLED_BACK = "bad numbers"
    OUT_OF_MEMORY = "out of memory"
    GPU = "GPU fault"
    BUG = "unexpected error"
    ERROR = "error"
    """One that may be different next time; the same one again is not."""
    STALLED = "stalled"
    """No progress for too long. The driver has ended the workers."""
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
_OF_CONNECTIONS = re.compile(
    r"gloo|nccl|c10d|process ?group|rendezvous|connection (closed|reset|refused|aborted)|broken pipe|"
    r"socket|timed? ?out|uncorrectable ecc|device unavailable",
    re.IGNORECASE,
)
"""In messages of plain RuntimeErrors: another worker, the network or the machine has failed, and not the code."""
_CHANGING = re.compile(r"0x[0-9a-f]+|/tmp/\S+|\d+(\.\d+)?", re.IGNORECASE)
"""What differs between two messages of the same error: addresses, temporary files, numbers."""
_PLACE = "finetune_place"

Place = tuple[int, int]
"""Index of a stage, and the optimizer steps that it has done."""


@dataclass(frozen=True)
class Failure:
    """A classified failure. `error` is the worker's own exception, `text` all of it for a log."""

    kind: Kind
    error: BaseException
    text: str
    advice: str = ""
    """What to do about it, where that is known."""
    node: str | None = None
    """Name of the node on which a GPU fault happened, or whose worker was behind in a stall, where that is known."""
    elsewhere: bool = False
    """Whether the next attempt should run on other nodes, so that this one's driver does not try again."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt may end otherwise."""
        return self.kind in (Kind.ERROR, Kind.LOST, Kind.STALLED, Kind.ROLLED_BACK) and not self.elsewhere

    @property
    def counts(self) -> bool:
        """Whether it uses up a retry. Rollbacks have a limit of their own (`training.dropped_steps.MOST`)."""
        return self.kind is not Kind.ROLLED_BACK

    @property
    def line(self) -> str:
        """The failure in a line."""
        return str(self.error) if self.kind is Kind.ROLLED_BACK else last_line(self.text)

    @property
    def signature(self) -> tuple[str, str, Place | None] | None:
        """What two failures that are the same have in common: the error's class, its message without what changes, and
        the place. None for what happens to workers from outside, whose repetition proves nothing."""
        if self.kind is not Kind.ERROR:
            return None
        return type(self.error).__qualname__, _CHANGING.sub("#", str(self.error)), step_of(self.error)


def classify(error: TrainingFailedError | HostOutOfMemoryError) -> Failure:
    """The failure that explains a worker group's end best."""
    causes = list(_causes(error))
    order = list(Kind)
    kind, cause = min(((_kind(cause), cause) for cause in causes), key=lambda pair: order.index(pair[0]))
    found = None if isinstance(cause, (UserError, GateNotPassed, Interrupted, RolledBack)) else _device_fault(cause)
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


@contextmanager
def errors_with_step(stage: int, trainer: Any = None) -> Iterator[None]:
    """Let an error that leaves this block say where it happened: its stage, and the trainer's step."""
    try:
        yield
    except Exception as error:
        setattr(error, _PLACE, (stage, trainer.state.global_step if trainer is not None else 0))
        raise


def step_of(error: BaseException) -> Place | None:
    """Where an error happened, as `errors_with_step` has noted it; the note survives Ray's pickling."""
    return getattr(error, _PLACE, None)


def last_line(text: str) -> str:
    """Return the last line of a text that is a message: not blank, and none of Ray's fields of an actor."""
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
        return _OF_FAULTS[found.fault.kind]
    if isinstance(error, _DETERMINISTIC):
        return Kind.BUG
    return Kind.LOST if _from_outside(error) else Kind.ERROR


def _from_outside(error: BaseException) -> bool:
    """Whether a worker, the network, a store or a machine has failed, and not the code that runs on it."""
    if not isinstance(error, Exception) or type(error).__module__.partition(".")[0] == "ray":
        return True
    return isinstance(error, DistError) or is_transient(error) or bool(_OF_CONNECTIONS.search(str(error)))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The workers' own exceptions, unwrapped from Ray's; the error itself where there are none."""
    failures: Iterable[BaseException] = getattr(error, "worker_failures", {}).values()
    found = False
    for failure in failures:
        found = True
        yield getattr(failure, "_base_exc", None) or getattr(failure, "cause", None) or failure
    if not found:
        yield error
