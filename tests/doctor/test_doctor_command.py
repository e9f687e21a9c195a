"""The program `finetune doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.doctor.tiny_job import JOB

from finetune_trainer.doctor.gather import driver_facts

GPU_HERE = driver_facts().devices > 0


def doctor(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    command = [sys.executable, "-c", "from finetune_cli.main import main; main()", "doctor", *arguments]
    variables = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=variables)


@pytest.mark.skipif(GPU_HERE, reason="this machine has GPUs")
def test_a_machine_without_gpus_is_told_what_a_gpu_node_would_lack(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Requirements of a GPU node" in done.stdout and "This machine has no GPU." in done.stdout
    assert "580 or newer" in done.stdout and "Install NVIDIA driver 580 or newer" in done.stdout


@pytest.mark.skipif(GPU_HERE, reason="this machine has GPUs")
def test_a_job_whose_needs_are_not_met(tmp_path: Path) -> None:
    done = doctor(tmp_path, "job.yaml", "--json", "--set", "spec.resources.gpusPerNode=2", PATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    lacking = {one["name"]: one for one in told["findings"] if one["state"] == "missing"}
    assert set(lacking) == {"C compiler and Python headers", "NVIDIA driver", "GPUs", "CUDA", "libcuda.so.1"}
    assert lacking["GPUs"]["needed"] == "2 per node" and told["job"] == "tiny"
    assert told["facts"]["toolchain"]["error"] == "Failed to find C compiler."


def test_a_wrong_job_is_told_before_anything_is_looked_for(tmp_path: Path) -> None:
    wrong = doctor(tmp_path, "job.yaml", "--set", "spec.resources.gpusPerNode=many")
    assert wrong.returncode == 2 and "resources.gpusPerNode" in wrong.stderr
