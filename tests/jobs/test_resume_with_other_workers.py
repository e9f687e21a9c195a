"""A stage started by two workers resumes with one: same global batch, same rows, same curve."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs.running import curve, done, run

Job = dict[str, Any]
STEPS, KEPT = 12, 6
TOLERANCE = 2e-4
"""Tolerance for a loss: float32 gradients are added in another order, which AdamW's first steps amplify."""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero", "streaming"), [(2, False), (3, True)])
def test_one_worker_goes_on_for_two(
    zero: int, streaming: bool, base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path
) -> None:
    job = _job(base_job, zero, streaming)
    code, output = run(write_job(job))
    assert code == 0, output
    undisturbed = curve(tmp_path / "runs/job/stages/00-sft")
    assert [step for step, *_ in undisturbed] == list(range(1, STEPS + 1))

    _interrupt(tmp_path / "runs/job/stages/00-sft")
    job["spec"]["resources"] = {"workersPerNode": 1}
    code, output = run(write_job(job), "--resume")
    assert code == 0, output
    assert f"resumes at step {KEPT}" in output and "2 workers wrote it and 1 go on, with 4 rows per step" in output
    stage = tmp_path / "runs/job/stages/00-sft"
    assert done(stage)["world_size"] == 1
    for before, after in zip(undisturbed, curve(stage), strict=True):
        assert after[0] == before[0] and after[2:] == before[2:], "step, learning rate and tokens"
        assert after[1] == pytest.approx(before[1], abs=TOLERANCE)


def _job(base_job: Job, zero: int, streaming: bool) -> Job:
    job = copy.deepcopy(base_job)
    job["spec"]["stages"] = [
        {
            "sft": {
                "data": {"sources": [{"file": "rows.jsonl"}], "streaming": streaming},
                "maxLength": 64,
                "maxSteps": STEPS,
                "saveSteps": KEPT,
                "saveTotalLimit": 9,
                "perDeviceTrainBatchSize": 2,
                "learningRate": 1e-3,
                "weightDecay": 0.1,
            }
        }
    ]
    job["spec"] |= {"resources": {"workersPerNode": 2}, "sharding": {"zero": zero}}
    return job


def _interrupt(stage: Path) -> None:
    """Leave the files of a run that is killed after its first checkpoint."""
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "result")
    shutil.rmtree(stage / f"checkpoints/checkpoint-{STEPS}")
