"""Runs whole jobs as a user does, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
