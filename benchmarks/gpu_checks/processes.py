"""Run a check in a process of its own, with a time limit for it and for all processes that it starts.

The process is a fork, so that the imports serve every check. A device must not be open before the fork, because CUDA
cannot be used in a fork then; `environment.preload` ensures that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_checks.record import Check, CheckFailed, Json, Options, Result, Skipped

TAIL = 1500
"""Number of characters of a process's output that an error quotes."""
_inside = False
"""Whether this process runs a check. Its forks stay in its process group, so that all end together."""


def run_check(check: Check, options: Options, limit: float) -> Result:
    """Run a check for at most `limit` seconds."""
    started = time.monotonic()
    answer, tail = run_alone(lambda: _answer_of(check, options), limit)
    seconds = time.monotonic() - started
    if answer is None:
        late = seconds >= limit
        kind = "TimeLimit" if late else "ProcessDied"
        message = f"no end after {limit:.0f} s" if late else "the process ended without an answer"
        return Result(check.name, False, seconds, error={"class": kind, "message": message, "output": tail})
    return Result(check.name, answer["ok"], seconds, answer["values"], answer.get("skipped"), answer.get("error"))


def run_alone(work: Callable[[], Json], limit: float) -> tuple[Json | None, str]:
    """Return what `work` returns in a fork, and the end of the fork's output.

    The result is None if the fork died or timed out. The fork and all processes that it started are then killed.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer, log = Path(directory, "answer.json"), Path(directory, "log")
        process = get_context("fork").Process(target=_child, args=(work, answer, log))
        process.start()
        try:
            process.join(limit)
        finally:
            _kill(process)
        text = log.read_text(errors="replace") if log.exists() else ""
        return (json.loads(answer.read_text()) if answer.exists() else None), text[-TAIL:]


def _child(work: Callable[[], Json], answer: Path, log: Path) -> None:
    global _inside
    if not _inside:
        os.setsid()
    _inside = True
    output = log.open("w", buffering=1)
    sys.stdout = sys.stderr = output
    for descriptor in (1, 2):  # also the output of C libraries and of programs that the check starts
        os.dup2(output.fileno(), descriptor)
    found = json.dumps(work())
    answer.with_suffix(".part").write_text(found)
    answer.with_suffix(".part").rename(answer)
    output.flush()
    os._exit(0)  # without the libraries' exit handlers, which may wait for each other


def _kill(process: Any) -> None:
    """Kill a process and, if it leads a process group, all that it started."""
    with suppress(ProcessLookupError):
        if _inside:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _answer_of(check: Check, options: Options) -> Json:
    try:
        return {"ok": True, "values": check.work(options)}
    except Skipped as skipped:
        return {"ok": None, "values": skipped.values, "skipped": skipped.reason}
    except Exception as error:
        traceback.print_exc()
        values: Json = error.values if isinstance(error, CheckFailed) else {}
        return {"ok": False, "values": values, "error": describe(error)}


def describe(error: BaseException) -> Json:
    """Return an error's class, its kind of device fault if it is one, its message and where it was raised."""
    from finetune_api.device_faults import device_fault

    text = f"{type(error).__name__}: {error}"
    found = device_fault(text)
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where: list[Any] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    kind = None if found is None else found.fault.kind.value
    return {"class": type(error).__name__, "kind": kind, "message": str(error)[:TAIL], "where": where}
