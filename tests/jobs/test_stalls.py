"""Workers that make no progress, in a real job: noticed, told with their stacks, started again; the curve is unchanged."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import run, workers

Job = dict[str, Any]
STEPS, TIMEOUT = 300, 4


@pytest.fixture
def job(base_job: Job) -> Job:
    stage = {
        "data": {"sources": [{"file": "rows.jsonl"}]},
        "maxLength": 64,
        "maxSteps": STEPS,
        "saveSteps": 10,
        "loggingSteps": 1,
        "perDeviceTrainBatchSize": 1,
        "dataloaderNumWorkers": 1,
    }
    base_job["spec"] |= {"stages": [{"sft": stage}], "resources": {"workersPerNode": 2}}
    base_job["spec"]["runPolicy"] = {"stallTimeout": TIMEOUT}
    return base_job


@pytest.mark.timeout(600)
def test_a_hanging_read_a_stopped_worker_and_a_sleeping_loader(
    job: Job, write_job: Callable[[Job], Path], tmp_path: Path
) -> None:
    path = write_job(job)
    stage = tmp_path / "runs/job/stages/00-sft"
    stage.mkdir(parents=True)
    (tmp_path / "runs/job/run.json").write_text("{}")
    calm = path.with_name("calm.yaml")
    calm.write_text(path.read_text().replace("name: job", "name: calm"))
    code, output = run(calm)
    assert code == 0 and "stalled" not in output, output


def _stopped_worker(driver: subprocess.Popen[str], seen: list[str]) -> psutil.Process:
    _read_until(driver, seen, r"\] (\d+)/300")
    victim = workers(driver.pid)[1]
    victim.send_signal(signal.SIGSTOP)
    return victim


def _read_until(driver: subprocess.Popen[str], seen: list[str], pattern: str) -> str:
    for line in driver.stdout or ():
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"{pattern!r} never came:\n{''.join(seen)}")
