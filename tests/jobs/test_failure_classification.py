"""How failures of a worker group are classified, and which of them are retried."""

from __future__ import annotations

import builtins
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from support.api.device_texts import TEXTS, DeviceText
from torch.distributed import DistBackendError

from finetune_api.device_faults import FaultKind, device_fault
from finetune_api.report import AttemptReport
from finetune_trainer.errors import TrainingFailed, UserError
from finetune_trainer.launch import drive
from finetune_trainer.launch.failures import Failure, Kind, classify, errors_with_step, step_of
from finetune_trainer.launch.fault_location import faults_with_node
from finetune_trainer.launch.worker_group import retry_attempts
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.training.dropped_steps import RolledBack


def test_a_helper_that_ray_kills_for_memory_is_out_of_memory() -> None:
    found = classify(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert found.kind is Kind.OUT_OF_MEMORY and not found.retryable and "low on memory" in found.text


def raised(case: DeviceText) -> BaseException:
    """Return an exception with the case's text, of the class that torch or Python raises."""
    if case.error == "CalledProcessError":
        command = [word.strip("'") for word in case.text.partition("[")[2].partition("]")[0].split(", ")]
        return subprocess.CalledProcessError(1, command)
    kind = getattr(builtins, case.error, None) or getattr(torch, case.error, None)
    found: BaseException = (kind or getattr(torch.distributed, case.error))(case.text)
    return found


def fault_of(*errors: BaseException) -> Failure:
    """Return the classification of a worker group's failure, built from each worker's exception as in Ray Train."""
    failures = {rank: UserExceptionWithTraceback(error, "") for rank, error in enumerate(errors)}
    return classify(pickle.loads(pickle.dumps(WorkerGroupError("snippets", failures))))


KINDS = {
    None: Kind.ERROR,
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


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_class_and_retry_of_a_worker_s_error(case: DeviceText) -> None:
    failure = fault_of(raised(case))
    assert failure.kind is KINDS[case.kind] and failure.retryable is (failure.kind in (Kind.ERROR, Kind.LOST))
    assert case.advises in failure.advice
    found = device_fault(failure.text)
    assert (found.fault.kind if found else None) is case.kind, (
        "the operator reads another class from the driver's words"
    )


def test_a_missing_compiler_is_told_as_a_user_error_with_its_remedy() -> None:
    failure = fault_of(RuntimeError("Failed to find C compiler. Please specify via CC environment variable."))
    assert isinstance(failure.error, UserError)
    assert "Failed to find C compiler" in str(failure.error) and "install gcc, libc6-dev" in str(failure.error)


def test_a_broken_gpu_is_told_with_its_node_whatever_the_other_workers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line names it, because Ray shortens the workers' messages and a report keeps the end."""
    monkeypatch.setenv("FINETUNE_NODE_NAME", "gpu-7")
    broken = in_worker(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    lost = in_worker(torch.distributed.DistBackendError("NCCL error: unhandled system error"))
    failure = fault_of(lost, broken)
    assert (failure.kind, failure.node, failure.retryable) == (Kind.GPU, "gpu-7", False)
    assert failure.text.splitlines()[-1].startswith(
        "GPU fault on node gpu-7: AcceleratorError: CUDA error: uncorrectable ECC"
    )
    assert not getattr(lost, "__notes__", [])


def in_worker(error: BaseException) -> BaseException:
    with pytest.raises(type(error)) as caught, faults_with_node():
        raise error
    return caught.value


def test_the_report_of_an_attempt_names_the_node_of_a_broken_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive, "TERMINATION_LOG", tmp_path / "log")
    reporter = AttemptReporter(["sft"])

    def work() -> None:
        raise TrainingFailed("a\nGPU fault on node gpu-7: CUDA error: uncorrectable ECC error", node="gpu-7")

    assert drive.report_outcome(reporter, work) == 1
    report = AttemptReport.model_validate_json((tmp_path / "log").read_text())
    assert (report.node, report.exit_code) == ("gpu-7", 1)


class _WorkersFailed(TrainingFailedError):
    """Ray Train's error with the exceptions of its workers."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__("\n".join(f"{type(error).__name__}: {error}" for error in errors))
        self.worker_failures = dict(enumerate(errors))


def at_step(step: int, error: Exception) -> Exception:
    """Return the error as a worker raises it after `step` steps of the first stage, pickled as Ray does."""
    try:
        with errors_with_step(0, SimpleNamespace(state=SimpleNamespace(global_step=step))):
            raise error
    except Exception as raised:
        found: Exception = pickle.loads(pickle.dumps(raised))
        return found


def attempts(*errors: Exception | None) -> tuple[Failure | None, list[str]]:
    """Return the final failure of attempts that end with these errors, and the reason of each restart."""
    ends: list[Failure | None] = [None if one is None else classify(_WorkersFailed(one)) for one in errors]
    restarted: list[str] = []
    left = iter(ends)
    ask: Callable[[], Failure | None] = lambda: next(left)  # noqa: E731
    return retry_attempts(ask, lambda: False, lambda _: False, 3, restarted.append, str), restarted


def shapes(step: int, size: int = 2) -> Exception:
    return at_step(step, RuntimeError(f"The size of tensor a ({size}) must match the size of tensor b (14)"))


def test_the_same_error_at_the_same_step_is_final() -> None:
    """The numbers in the message may differ."""
    failure, restarted = attempts(shapes(5), shapes(5, size=3), None)
    assert failure is not None and len(restarted) == 1
    last = failure.text.splitlines()[-1]
    assert last.startswith("RuntimeError: The size of tensor a (3)")
    assert "twice in a row after step 5 of stage 1: not retried" in last


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


def test_rollbacks_use_up_no_retries_and_are_told_in_their_own_words() -> None:
    """`training.dropped_steps` limits rollbacks, so equal ones in a row are not a repeated error."""
    back = RolledBack("step 9: the loss is nan; rolled back to step 5")
    failure, restarted = attempts(*[at_step(8, back)] * 9, None)
    assert failure is None and restarted == [f"bad numbers: {back}"] * 9


def test_a_workers_own_error_outweighs_the_others_broken_connections() -> None:
    found = classify(_WorkersFailed(at_step(5, RuntimeError("Connection closed by peer")), shapes(5)))
    assert found.kind is Kind.ERROR and step_of(found.error) == (0, 5) and found.retryable
