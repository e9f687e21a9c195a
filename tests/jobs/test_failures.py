"""What a worker group's end means."""

from __future__ import annotations

import builtins
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from device_texts import TEXTS, DeviceText
from ray.exceptions import OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from finetune_api.device_faults import FaultKind, device_fault
from finetune_api.report import AttemptReport
from finetune_trainer.errors import TrainingFailed, UserError
from finetune_trainer.launch import attempt
from finetune_trainer.launch.failures import Failure, Kind, classify
from finetune_trainer.launch.fault_place import faults_with_node
from finetune_trainer.progress.attempt import AttemptReporter


def test_a_helper_that_ray_kills_for_memory_is_out_of_memory() -> None:
    found = classify(OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert found.kind is Kind.OUT_OF_MEMORY and not found.retryable and "low on memory" in found.text


def raised(case: DeviceText) -> BaseException:
    """The exception that raises a text, of the class that raises it in torch or in Python."""
    if case.error == "CalledProcessError":
        command = [word.strip("'") for word in case.text.partition("[")[2].partition("]")[0].split(", ")]
        return subprocess.CalledProcessError(1, command)
    kind = getattr(builtins, case.error, None) or getattr(torch, case.error, None)
    found: BaseException = (kind or getattr(torch.distributed, case.error))(case.text)
    return found


def fault_of(*errors: BaseException) -> Failure:
    """The class of a worker group's end, each worker's exception as Ray Train hands it to the driver."""
    failures = {rank: UserExceptionWithTraceback(error, "") for rank, error in enumerate(errors)}
    return classify(pickle.loads(pickle.dumps(WorkerGroupError("snippets", failures))))


KINDS = {
    None: Kind.LOST,
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
    assert failure.kind is KINDS[case.kind] and failure.retryable is (failure.kind is Kind.LOST)
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
    """In the last line, since Ray shortens what each worker said and a report keeps the end."""
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
    monkeypatch.setattr(attempt, "TERMINATION_LOG", tmp_path / "log")
    reporter = AttemptReporter(["sft"])

    def work() -> None:
        raise TrainingFailed("a\nGPU fault on node gpu-7: CUDA error: uncorrectable ECC error", node="gpu-7")

    assert attempt.say_last_word(reporter, work) == 1
    report = AttemptReport.model_validate_json((tmp_path / "log").read_text())
    assert (report.node, report.exit_code) == ("gpu-7", 1)
