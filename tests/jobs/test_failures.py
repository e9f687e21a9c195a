"""What a worker group's end means, and whether it is tried again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import TrainingFailedError
from torch.distributed import DistBackendError

from finetune_trainer.launch.failures import Failure, Kind, classify, place_of, placed
from finetune_trainer.launch.group_fit import keep_trying


def test_a_helper_that_ray_kills_for_memory_is_out_of_memory() -> None:
    found = classify(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert found.kind is Kind.OUT_OF_MEMORY and not found.retryable and "low on memory" in found.text


class _WorkersFailed(TrainingFailedError):
    """Ray Train's error with what its workers raised."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__("\n".join(f"{type(error).__name__}: {error}" for error in errors))
        self.worker_failures = dict(enumerate(errors))


def at_step(step: int, error: Exception) -> Exception:
    """The error as a worker raises it after so many steps of the first stage, and as Ray passes it on."""
    try:
        with placed(0, SimpleNamespace(state=SimpleNamespace(global_step=step))):
            raise error
    except Exception as raised:
        found: Exception = pickle.loads(pickle.dumps(raised))
        return found


def attempts(*errors: Exception | None) -> tuple[Failure | None, list[str]]:
    """How attempts that end so end in all, and why each one after the first was begun."""
    ends: list[Failure | None] = [None if one is None else classify(_WorkersFailed(one)) for one in errors]
    restarted: list[str] = []
    left = iter(ends)
    ask: Callable[[], Failure | None] = lambda: next(left)  # noqa: E731
    return keep_trying(ask, lambda: False, lambda _: False, 3, restarted.append, str), restarted


def shapes(step: int, size: int = 2) -> Exception:
    return at_step(step, RuntimeError(f"The size of tensor a ({size}) must match the size of tensor b (14)"))


def test_the_same_error_at_the_same_step_is_final() -> None:
    """Numbers in its message may differ."""
    failure, restarted = attempts(shapes(5), shapes(5, size=3), None)
    assert failure is not None and len(restarted) == 1
    last = failure.text.splitlines()[-1]
    assert last.startswith("RuntimeError: The size of tensor a (3)")
    assert "twice in a row after step 5 of stage 1: not tried again" in last


@pytest.mark.parametrize(
    "ends",
    [
        (shapes(5), shapes(6)),
        (shapes(5), at_step(5, RuntimeError("another"))),
        (shapes(5), ConnectionError("the store is away"), shapes(5)),
        (at_step(0, ConnectionError("the store is away")),) * 2,
        (at_step(5, RuntimeError("[../gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.1]:3")),) * 2,
        (DistBackendError("NCCL error"),) * 2,
        (ActorDiedError(),) * 2,
    ],
)
def test_what_may_end_otherwise_is_tried_again(ends: tuple[Exception, ...]) -> None:
    failure, restarted = attempts(*ends, None)
    assert failure is None and len(restarted) == len(ends)


def test_retries_without_progress_are_limited() -> None:
    failure, restarted = attempts(*[at_step(0, ConnectionError("the store is away"))] * 5)
    assert failure is not None and len(restarted) == 3


def test_a_workers_own_error_outweighs_the_others_broken_connections() -> None:
    found = classify(_WorkersFailed(at_step(5, RuntimeError("Connection closed by peer")), shapes(5)))
    assert found.kind is Kind.ERROR and place_of(found.error) == (0, 5) and found.retryable
