"""Killed workers, a killed driver, SIGTERM: the curve is that of a run that nothing disturbed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import curve, done, kill, run, start, workers

Job = dict[str, Any]
STEPS, SAVE = 40, 5


@pytest.fixture
def job(base_job: Job) -> Job:
    spec = base_job["spec"]
    spec["stages"] = [
        {
            "sft": {
                "data": {"sources": [{"file": "rows.jsonl"}]},
                "maxLength": 64,
                "maxSteps": STEPS,
                "saveSteps": SAVE,
                "perDeviceTrainBatchSize": 2,
                "learningRate": 1e-3,
                "lora": {"loraDropout": 0.1},
            }
        }
    ]
    spec["resources"] = {"workersPerNode": 2}
    return base_job


@pytest.mark.timeout(900)
def test_killed_workers_driver_and_sigterm(job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    path = write_job(job)
    code, output = run(path)
    assert code == 0, output
    undisturbed = curve(tmp_path / "runs/job/stages/00-sft")
    assert [step for step, *_ in undisturbed] == list(range(1, STEPS + 1))

    path.write_text(path.read_text().replace("name: job", "name: disturbed"))
    stage = tmp_path / "runs/disturbed/stages/00-sft"

    driver = start(path)
    seen = _kill_workers(driver, times=1)
    driver.kill()  # the driver too, right after its workers began anew
    driver.wait()
    assert "starting again from the last checkpoint" in seen
    assert not (stage / "done.json").exists()

    driver = start(path, "--resume")
    _wait_for(driver, "model ready")
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode in (75, 0), output  # 0 where the last steps were quicker than the signal

    code, output = run(path, "--resume")
    assert code == 0, output
    assert curve(stage) == undisturbed
    assert done(stage)["steps"] == STEPS

    code, output = run(path, "--resume")
    assert code == 0, output
    assert "sft: done before, not run again" in output
    code, output = run(path)
    assert code == 2, output
    assert "--resume" in output and "--fresh" in output


def _kill_workers(driver: Any, times: int) -> str:
    """Kill one worker each time training shows a step past a checkpoint; returns the output so far."""
    seen = ""
    for _ in range(times):
        seen += _wait_for(driver, "loss")
        kill(workers(driver.pid)[-1])
        seen += _wait_for(driver, "starting again from the last checkpoint")
        seen += _wait_for(driver, "model ready")
    return seen


def _wait_for(driver: Any, text: str) -> str:
    seen = ""
    for line in driver.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}")
