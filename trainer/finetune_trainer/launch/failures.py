"""What an ended worker group's failure means, and whether to try again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ray.exceptions import OutOfMemoryError as HostOutOfMemoryError
from ray.train import TrainingFailedError
from torch import OutOfMemoryError as DeviceOutOfMemoryError

from finetune_trainer.errors import GateNotPassed, Interrupted, UserError


class Kind(Enum):
    """Classes of failure, most telling first: one worker's word on the cause outweighs the others' broken pipes."""

    USER = "user error"
    GATE = "gate not passed"
    INTERRUPTED = "interrupted"
    OUT_OF_MEMORY = "out of memory"
    BUG = "unexpected error"
    LOST = "worker lost"


# Raised again by the same code on the same data: trying again would only waste the machines.
_DETERMINISTIC = (TypeError, ValueError, LookupError, AttributeError, AssertionError, ImportError, NameError,
                  NotImplementedError)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A classified failure. `error` is the worker's own exception, `text` all of it for a log."""

    kind: Kind
    error: BaseException
    text: str

    @property
    def retryable(self) -> bool:
        return self.kind is Kind.LOST


def classify(error: TrainingFailedError | HostOutOfMemoryError) -> Failure:
    """The failure that explains a worker group's end best."""
    causes = list(_causes(error))
    order = list(Kind)
    kind, cause = min(((_kind(cause), cause) for cause in causes), key=lambda pair: order.index(pair[0]))
    return Failure(kind, cause, str(error))


def _kind(error: BaseException) -> Kind:
    if isinstance(error, UserError):
        return Kind.USER
    if isinstance(error, GateNotPassed):
        return Kind.GATE
    if isinstance(error, Interrupted):
        return Kind.INTERRUPTED
    if isinstance(error, (DeviceOutOfMemoryError, HostOutOfMemoryError, MemoryError)):
        return Kind.OUT_OF_MEMORY
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
