"""Runs the doctor's scripts, each in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 180.0
"""Timeout. Importing torch and opening eight GPUs takes about ten seconds on a busy node."""
LAUNCHER, TORCH = (Path(__file__).with_name(name) for name in ("launcher.py", "torch_probe.py"))


def run_program(program: Path, *arguments: str) -> dict[str, Any]:
    """Run a script and return the JSON in the last line of its output.

    If the script crashes, such as by a signal of the driver, or does not end in time, the result has an `error`.
    """
    command = [sys.executable, "-P", str(program), *arguments]  # -P: libraries must not import modules of this folder
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {SECONDS:.0f} s"}
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        return {"error": f"ended with exit code {done.returncode}: {last[:300]}"}
    if answer.get("error") and "fatal error:" in done.stderr:
        answer["error"] = next(line for line in done.stderr.splitlines() if "fatal error:" in line).strip()[:300]
    return answer
