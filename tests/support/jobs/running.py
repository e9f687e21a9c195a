"""Runs whole jobs as a user does, in processes of their own."""

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
    """`finetune run`, its output readable line by line."""
    command = [sys.executable, "-c", "from finetune_cli.main import main; main()", "run", str(job), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "200"}
    )


def run(job: Path, *options: str, timeout: float = 600) -> tuple[int, str]:
    """Exit code and output of `finetune run`."""
    process = start(job, *options)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def workers(driver: int) -> list[psutil.Process]:
    """Ray Train's worker processes below a driver; none where it has none (yet, or any more)."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if "RayTrainWorker" in _name(child)]


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


def curve(stage: Path) -> list[tuple[int, float, float, int]]:
    """(step, loss, learning rate, tokens) of every step of a stage."""
    rows = read_metrics((stage / "metrics.jsonl").read_text())
    return [(row["step"], row["loss"], row["learning_rate"], row["tokens"]) for row in rows if "loss" in row]


def losses(stage: Path) -> list[float]:
    return [loss for _, loss, _, _ in curve(stage)]


def done(stage: Path) -> dict[str, Any]:
    return dict(json.loads((stage / "done.json").read_text()))


def under_each_zero(
    job: Job, write_job: Callable[[Job], Path], directory: Path, stages: Callable[[int], list[Job]]
) -> dict[int, list[Path]]:
    """Run one job by one worker (ZeRO-0), and by two with ZeRO-1, 2 and 3; its stages' directories by ZeRO stage.

    Args:
        directory: what its storage lies in.
        stages: the job's stages for so many workers, each of which has its share of a step's rows.
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
