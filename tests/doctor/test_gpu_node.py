"""The doctor checks a node before a GPU is allocated, on one machine, and on all nodes of an attempt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.doctor import fake_driver
from support.doctor.node_facts import GOOD, NEEDS, OLD, TORCH, V100, with_parts
from support.doctor.tiny_job import JOB

from finetune_api.device_faults import FaultKind, device_fault
from finetune_api.runconfig import RunConfig
from finetune_trainer.doctor.examine import examine
from finetune_trainer.doctor.facts import Driver, Facts
from finetune_trainer.errors import TrainingFailed, UserError
from finetune_trainer.launch import drive, node
from finetune_trainer.launch.cluster_preflight import run_preflight
from finetune_trainer.launch.node_role import NodeRole
from finetune_trainer.preflight.gpu_node import fault_of, image_problems, machine_problems

BROKEN = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (OLD, ["NVIDIA driver: found 550.90.07, needed 580 or newer for torch's CUDA 13.0."]),
        (replace(OLD, driver=Driver()), ["NVIDIA driver: found one for CUDA 12.4, needed 580 or newer"]),
        (with_parts(toolchain={"compiler": None, "error": "x"}), ["C compiler and Python headers: found no compiler"]),
        (with_parts(torch={"gpus": (V100,) * 8, "error": "no kernel image is available for execution on the device"}),
         ["GPU architecture: found Tesla V100"]),
        (with_parts(torch={"error": BROKEN}, toolchain={"error": "none"}), ["C compiler and Python headers", "CUDA"]),
    ],
    ids=["an old driver", "an old driver without a version", "no compiler", "an old GPU", "two things"],
)  # fmt: skip
def test_a_node_that_is_set_up_wrong_is_a_user_error(facts: Facts, told: list[str]) -> None:
    """Each cause is reported once: a missing driver is reported, and the missing CUDA is not."""
    fault = fault_of(examine(facts, NEEDS), "gpu-7")
    assert isinstance(fault, UserError) and len(fault.problems) == len(told)
    for problem, words in zip(fault.problems, told, strict=True):
        assert problem.path == "resources.gpusPerNode" and problem.message.startswith(words)


@pytest.mark.parametrize(
    "facts",
    [with_parts(torch={"error": BROKEN}), with_parts(torch={"gpus": TORCH.gpus[:7]})],
    ids=["a GPU that computes no more", "a GPU that has gone"],
)
def test_a_gpu_that_does_not_work_is_the_node_s_fault(facts: Facts) -> None:
    fault = fault_of(examine(facts, NEEDS), "gpu-7")
    assert isinstance(fault, TrainingFailed) and fault.node == "gpu-7"
    found = device_fault(str(fault))
    assert found is not None and found.fault.kind is FaultKind.GPU, "the operator must move the next attempt"


def test_a_node_that_suits_the_job() -> None:
    assert fault_of(examine(GOOD, NEEDS), "gpu-7") is None


@pytest.fixture
def without_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path of the termination message; afterwards, restore the environment."""
    monkeypatch.setattr(drive, "TERMINATION_LOG", tmp_path / "termination-log")
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    before = set(os.environ)
    yield tmp_path / "termination-log"
    for name in set(os.environ) - before:
        del os.environ[name]


def run_config(tmp_path: Path, stages: list[dict[str, Any]] | None = None, gpus: int = 1) -> RunConfig:
    spec = JOB["spec"] | {"resources": {"gpusPerNode": gpus}} | ({"stages": stages} if stages else {})
    if stages:
        spec["model"] = {"config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                                    "num_hidden_layers": 1, "num_attention_heads": 2}}  # fmt: skip
    places = {"root": str(tmp_path / "runs" / "tiny"), "baseDir": "/", "cacheDir": str(tmp_path / "cache")}
    return RunConfig.model_validate({"job": JOB | {"spec": spec}, **places})


def test_an_image_without_a_compiler_is_found_before_a_gpu_is_claimed(
    tmp_path: Path, log: Path, without_compiler: None
) -> None:
    """The preflight's pod, which has no GPU, ends with exit code 2 and the remedy."""
    data = {"sources": [{"inline": [{"text": "to be or not to be, that is the question"}] * 40}]}
    stages = [
        {"tokenizer": {"data": data, "vocabSize": 300}},
        {"pretrain": {"data": data, "maxSteps": 1, "blockSize": 32}},
    ]
    file = tmp_path / "run.json"
    file.write_text(run_config(tmp_path, stages).model_dump_json(by_alias=True, exclude_none=True))
    assert run_preflight(file) == 2
    message = json.loads(log.read_text())["message"]
    assert message.startswith("resources.gpusPerNode: C compiler and Python headers: found no compiler on PATH")
    assert "Install gcc, libc6-dev" in message and "driver" not in message


def test_of_a_job_on_cpus_the_image_is_not_looked_into(tmp_path: Path, without_compiler: None) -> None:
    assert image_problems(run_config(tmp_path, gpus=0)) == []
    assert len(image_problems(run_config(tmp_path))) == 1


def test_a_machine_without_gpus_is_told_at_once(tmp_path: Path) -> None:
    (problem,) = machine_problems(run_config(tmp_path), 2, 0)
    assert str(problem) == "resources.gpusPerNode: 2 GPUs are asked for and this machine has 0"


def test_gpus_on_an_old_driver_are_a_user_error_on_one_machine(tmp_path: Path) -> None:
    """NVML counts the GPU, so torch would train on CPUs; `validate` reports the driver found and needed."""
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB | {"spec": JOB["spec"] | {"resources": {"gpusPerNode": 1}}}))
    command = [sys.executable, "-c", "from finetune_cli.main import main; main()", "validate", "job.yaml"]
    environment = os.environ | fake_driver.build(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "NVIDIA driver: found one for CUDA 12.4, needed 580 or newer for torch's CUDA 13.0" in done.stderr


@pytest.mark.parametrize("index", ["0", "1"])
def test_gpus_on_an_old_driver_are_a_user_error_in_every_pod(
    index: str, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver and a worker pod both write the termination message, and the worker does not join."""
    for name, value in fake_driver.build(tmp_path).items():
        monkeypatch.setenv(name, value)
    run = run_config(tmp_path)
    if index == "0":
        code = drive.report_outcome(drive.AttemptReporter(["sft"]), lambda: drive._train(run, None, None, print))  # type: ignore[arg-type]
    else:
        code = node._worker(run, NodeRole(False, "no-such-host:1", ()))
    report = json.loads(log.read_text())
    assert code == 2 and report["exitCode"] == 2
    assert "NVIDIA driver: found one for CUDA 12.4, needed 580 or newer" in report["message"]
    assert not (tmp_path / "runs").exists()
