"""Killed workers, a killed driver and SIGTERM: the loss curve equals that of an uninterrupted run.

The steps are random. The seed is printed with the steps; KILL_SEED=... repeats them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.jobs.running import curve, done, kill, run, start, workers
from support.jobs.tiny_rows import dialogue

from finetune_trainer.layout import RUN_CONFIG

Job = dict[str, Any]
STEPS, SAVE, LAST_HIT = 160, 5, 24
AGAIN = "restarting from the last checkpoint"


@pytest.fixture
def job(base_job: Job) -> Job:
    """Return a job with dropout, to test the random state, and an evaluation per step, so that each step is logged."""
    held_out = {"sources": [{"inline": [dialogue("3 plus 4", "makes 7"), dialogue("5 plus 4", "makes 9")]}]}
    stage = {
        "data": {"sources": [{"file": "rows.jsonl"}]},
        "evalData": held_out,
        "evalSteps": 1,
        "maxLength": 64,
        "maxSteps": STEPS,
        "saveSteps": SAVE,
        "perDeviceTrainBatchSize": 2,
        "learningRate": 1e-3,
        "lora": {"loraDropout": 0.1},
    }
    base_job["spec"]["stages"] = [{"sft": stage}]
    base_job["spec"]["resources"] = {"workersPerNode": 2}
    return base_job


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


@pytest.mark.timeout(900)
def test_killed_workers_driver_and_sigterm(
    job: Job, write_job: Callable[[Job], Path], tmp_path: Path, chance: random.Random
) -> None:
    """Kill three workers and the driver at random steps, then send SIGTERM; the curve is unchanged."""
    path = write_job(job)
    code, output = run(path)
    assert code == 0, output
    undisturbed = curve(tmp_path / "runs/job/stages/00-sft")
    assert [step for step, *_ in undisturbed] == list(range(1, STEPS + 1))

    path.write_text(path.read_text().replace("name: job", "name: disturbed"))
    stage = tmp_path / "runs/disturbed/stages/00-sft"
    *worker_hits, driver_hit = sorted(chance.sample(range(1, LAST_HIT), 4))
    print(f"workers killed at steps {worker_hits}, the driver at {driver_hit}")

    driver = start(path)
    for hit in worker_hits:
        _wait_for_step(driver, hit)
        kill(chance.choice(workers(driver.pid)))
        _wait_for(driver, AGAIN)
    _wait_for_step(driver, driver_hit)
    orphans = workers(driver.pid)
    driver.kill()
    driver.wait()
    assert len(orphans) == 2 and not psutil.wait_procs(orphans, timeout=5)[1], "they end with their driver"
    assert not (stage / "done.json").exists()

    driver = start(path, "--resume")
    _wait_for(driver, "model ready")
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 75, output

    code, output = run(path, "--resume")
    assert code == 0, output
    assert curve(stage) == undisturbed
    assert done(stage)["steps"] == STEPS
    assert json.loads((tmp_path / "runs/disturbed" / RUN_CONFIG).read_text())["attempt"] == 3

    code, output = run(path, "--resume")
    assert code == 0, output
    assert "sft: done before, not run again" in output
    code, output = run(path)
    assert code == 2, output
    assert "--resume" in output and "--fresh" in output


def _wait_for_step(driver: Any, step: int) -> None:
    """Wait until the workers have started and the driver logs `step` or a later one."""
    _wait_for(driver, "model ready")
    seen = ""
    for line in driver.stdout:
        seen += line
        told = re.search(rf" (\d+)/{STEPS} ", line)
        if told and int(told[1]) >= step:
            return
    raise AssertionError(f"step {step} never came:\n{seen}")


def _wait_for(driver: Any, text: str) -> None:
    seen = ""
    for line in driver.stdout:
        seen += line
        if text in line:
            return
    raise AssertionError(f"{text!r} never came:\n{seen}")
