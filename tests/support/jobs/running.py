"""Run whole jobs like a user, in subprocesses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from finetune_trainer.progress.metrics_log import read_metrics

Job = dict[str, Any]


def start(job: Path, *options: str) -> subprocess.Popen[str]:
    """Start `finetune run` with its output as readable lines."""
    command = [sys.executable, "-c", "from finetune_cli.main import main; main()", "run", str(job), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "200"}
    )


def run(job: Path, *options: str, timeout: float = 600) -> tuple[int, str]:
    """Return the exit code and output of `finetune run`."""
    process = start(job, *options)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def workers(driver: int) -> list[psutil.Process]:
    """Return Ray Train's worker processes below a driver; empty if it has none."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if "RayTrainWorker" in _name(child)]


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def curve(stage: Path) -> list[tuple[int, float, float, int]]:
    """Return (step, loss, learning rate, tokens) of every step of a stage."""
    rows = read_metrics((stage / "metrics.jsonl").read_text())
    return [(row["step"], row["loss"], row["learning_rate"], row["tokens"]) for row in rows if "loss" in row]


def losses(stage: Path) -> list[float]:
    return [loss for _, loss, _, _ in curve(stage)]


def done(stage: Path) -> dict[str, Any]:
    return dict(json.loads((stage / "done.json").read_text()))


def under_each_zero(
    job: Job, write_job: Callable[[Job], Path], directory: Path, stages: Callable[[int], list[Job]]
) -> dict[int, list[Path]]:
    """Run one job with one worker (ZeRO-0) and with two (ZeRO-1, 2 and 3); return the stage directories by ZeRO stage.

    Args:
        directory: parent of the job's storage.
        stages: returns the job's stages for a number of workers, each of which gets its share of a step's rows.
    """
    found = {}
    for zero in (0, 1, 2, 3):
        workers = 2 if zero else 1
        job["metadata"]["name"] = f"zero{zero}"
        job["spec"] |= {"resources": {"workersPerNode": workers}, "sharding": {"zero": zero}, "stages": stages(workers)}
        code, output = run(write_job(job))
        assert code == 0, output
        found[zero] = sorted((directory / f"runs/zero{zero}/stages").iterdir())
        assert {done(one)["world_size"] for one in found[zero]} == {workers}
    return found


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
