"""Stalled workers in a real job are detected, reported with their stacks, and restarted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.jobs.running import curve, start, workers

Job = dict[str, Any]
STEPS, TIMEOUT = 160, 5
AGAIN = "restarting from the last checkpoint"


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
    base_job["spec"]["runPolicy"] = {"stallTimeout": TIMEOUT, "backoffLimit": 3}
    return base_job


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stopped_worker_a_hanging_read_and_a_sleeping_loader(
    job: Job, write_job: Callable[[Job], Path], tmp_path: Path
) -> None:
    """Three stalls in one job are each resolved by a restart.

    The read hangs like that of an unresponsive store: its file is a pipe to which nothing is written.
    """
    stage = tmp_path / "runs/job/stages/00-sft"
    driver, seen = start(write_job(job)), Lines()
    seen.until(driver, r"\] \d+/160 ")
    victim = workers(driver.pid)[1]
    victim.send_signal(signal.SIGSTOP)
    struck = time.monotonic()
    told = seen.until(driver, "stalled: no progress")
    assert time.monotonic() - struck < 2 * TIMEOUT + 10, "twice the timeout, and the collection of stacks"
    assert f"process {victim.pid}" in told and "stopped by a signal (SIGSTOP)" in told
    assert "in run_stages" in "".join(seen.lines), "the stack of the worker that waits for it"
    assert re.search(r"last collective operation: gloo:\w+, number \d+ of .*: not finished", "".join(seen.lines))
    os.mkfifo(stage / "dropped.json")
    seen.until(driver, AGAIN)

    told = seen.until(driver, "stalled: no progress")
    assert "behind is worker" in told and "in read_bytes" in "".join(seen.lines)
    (stage / "dropped.json").unlink()
    seen.until(driver, AGAIN)

    seen.until(driver, r"\] \d+/160 ")
    (loader,) = _loaders(workers(driver.pid)[0])
    loader.send_signal(signal.SIGSTOP)
    told = seen.until(driver, "stalled: no progress")
    assert "loading rows" in told
    seen.until(driver, AGAIN)
    assert f"child {loader.pid}: stopped by a signal" in "".join(seen.lines)

    output = seen.rest(driver)
    assert driver.wait(timeout=60) == 0, output
    assert [step for step, *_ in curve(stage)] == list(range(1, STEPS + 1))
    assert len(list((tmp_path / "runs/job/stalls").glob("attempt-1-*.txt"))) == 3


class Lines:
    """Collects the output of a driver."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def until(self, driver: subprocess.Popen[str], pattern: str) -> str:
        assert driver.stdout is not None
        for line in driver.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} never came:\n{''.join(self.lines)}")

    def rest(self, driver: subprocess.Popen[str]) -> str:
        assert driver.stdout is not None
        self.lines += driver.stdout
        return "".join(self.lines)


def _loaders(worker: psutil.Process) -> list[psutil.Process]:
    """Return the data loader processes of a worker."""
    return [child for child in worker.children() if child.status() != psutil.STATUS_ZOMBIE]
