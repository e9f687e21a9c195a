"""Run the doctor's programs, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 180.0
"""Importing torch and opening eight GPUs takes some ten seconds on a busy node."""
LAUNCHER, TORCH = (Path(__file__).with_name(name) for name in ("launcher.py", "torch_probe.py"))


def answer_of(program: Path, *arguments: str) -> dict[str, Any]:
    """Return what a program prints as its last line of JSON.

    One that dies, such as by a driver's signal, or does not end in time, answers with an `error` that says so.
    """
    command = [sys.executable, "-P", str(program), *arguments]  # this folder's modules are not for the libraries
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SECONDS:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return {"error": f"ended with exit code {done.returncode}: {last[:300]}"}
    if answer.get("error") and "fatal error:" in done.stderr:
        answer["error"] = next(line for line in done.stderr.splitlines() if "fatal error:" in line).strip()[:300]
    return answer
