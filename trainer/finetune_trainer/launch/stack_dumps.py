"""Collect the stacks of hanging workers from another process, without running Python code in the worker."""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer.launch.flight_recorder import Collective, answer_questions, last_collectives
from finetune_trainer.progress.process_activity import children, state

SIGNAL = signal.SIGUSR2
DIRECTORY = Path(tempfile.gettempdir(), f"finetune-stacks-{os.getuid()}")
WRITE_SECONDS, PY_SPY_SECONDS = 3.0, 15.0
LOOK_SECONDS = 0.05
_STATES = {
    "T": "stopped by a signal (SIGSTOP)",
    "t": "stopped by a debugger",
    "D": "blocked in the kernel",
    "Z": "ended",
    "": "gone",
}
STOPPED = ("T", "t")
"""States of a process that does not run until another process resumes it."""
log = logging.getLogger(__name__)
_files: list[Any] = []
"""Files of faulthandler, which must stay open."""


@dataclass(frozen=True)
class Stacks:
    """State and stacks of a process."""

    state: str
    """State as in /proc/PID/stat, such as `R`, `S` or `T`; empty if the process has ended."""
    text: str
    last: tuple[Collective, ...] = ()
    """The newest collective operation of each of its process groups; empty if unknown."""

    @property
    def told(self) -> str:
        """Why the process cannot continue, according to its state; empty if it can."""
        return _STATES.get(self.state, "")


def answer_inquiries() -> None:
    """Let other processes of this user read the Python stacks and the collective operations of this process.

    The process writes the stacks of its threads to a file whenever it receives `SIGNAL`. The handler of faulthandler is
    native: it needs neither the GIL nor the main thread. Forked children inherit it.
    """
    try:
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        file = open(_file(os.getpid()), "w")  # noqa: SIM115 (open as long as the process lives)
    except OSError as error:  # such as a full disk: training works without stacks
        log.warning("this process can't write its stacks: %s", error)
        return
    _files[:] = [file]
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    answer_questions(_socket(os.getpid()))


def collect(pids: Iterable[int]) -> dict[int, Stacks]:
    """Return the stacks of processes of this machine and of their children, by process id."""
    return {pid: _of(pid) for pid in pids}


def kill(pids: Iterable[int]) -> None:
    """Kill processes of this machine at once, including stopped ones."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _of(pid: int) -> Stacks:
    if state(pid) in ("", "Z"):
        return Stacks(state(pid), "")
    last = [] if state(pid) in STOPPED else last_collectives(_socket(pid))
    parts = [f"last collective operation: {one.words}" for one in last] + [_python(pid)]
    parts += [f"child {child}: {_STATES.get(state(child), 'alive')}" for child in children(pid)]
    if native := _native(pid):
        parts.append(native)
    # The state is read last, because a process stops a moment after it receives SIGSTOP.
    return Stacks(state(pid), "\n".join(filter(None, parts)), tuple(last))


def _python(pid: int) -> str:
    """Return what faulthandler writes after the signal. A stopped process writes nothing."""
    file = _file(pid)
    if not file.exists() or not _catches(pid):
        return "no Python stacks: the process has not begun to answer signals"
    # One after the other: they all write to the file of the first one.
    texts = [_asked(one, file) for one in [pid, *filter(_catches, children(pid))]]
    return "\n".join(filter(None, texts)) or "no Python stacks: the process does not react to signals"


def _asked(pid: int, file: Path) -> str:
    """Return what a process appends to a file after the signal."""
    before = file.stat().st_size
    try:
        os.kill(pid, SIGNAL)
    except OSError as error:
        return f"no Python stacks: {error}"
    return "" if state(pid) in STOPPED else _written(file, before)


def _written(file: Path, start: int) -> str:
    """Return what is appended to a file until it stops growing. Polls, because there is no event to wait for."""
    deadline, size = time.monotonic() + WRITE_SECONDS, start
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        now = file.stat().st_size
        if now == size > start:
            break
        size = now
    with open(file, errors="replace") as opened:
        opened.seek(start)
        return opened.read()


def _catches(pid: int) -> bool:
    """Return whether a process has a handler for the signal. Without one the signal would end it."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False


def _native(pid: int) -> str:
    """Return native stacks by py-spy, if it is installed and may trace the process."""
    tool = shutil.which("py-spy")
    if tool is None or state(pid) in STOPPED:
        return ""
    command = [tool, "dump", "--native", "--nonblocking", "--pid", str(pid)]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_SECONDS, check=False)
        return f"native stacks:\n{done.stdout}" if done.returncode == 0 else ""
    return ""


def _file(pid: int) -> Path:
    return DIRECTORY / f"{pid}.txt"


def _socket(pid: int) -> Path:
    return DIRECTORY / f"{pid}.sock"
