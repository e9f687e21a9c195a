"""The stacks of workers that hang, got from outside: the worker itself need not run a line of Python for it."""

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

from finetune_trainer.launch.collectives import Collective, answer_questions, last_collectives
from finetune_trainer.progress.activity import children, state

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
"""States of a process that runs no code until another one lets it go on."""
log = logging.getLogger(__name__)
_files: list[Any] = []
"""What faulthandler writes to must stay open."""


@dataclass(frozen=True)
class Stacks:
    """What is known of a process from outside."""

    state: str
    """`T`, `S`, `R`, … as in /proc/PID/stat; empty where the process is gone."""
    text: str
    last: tuple[Collective, ...] = ()
    """The newest collective operation of each of its process groups; empty where that is not known."""

    @property
    def told(self) -> str:
        """Why the process can't go on, where its state says so; else empty."""
        return _STATES.get(self.state, "")


def answer_inquiries() -> None:
    """Let other processes of this user learn where this one hangs: its Python stacks and its collective operations.

    It writes its threads' stacks to a file of its own whenever it gets `SIGNAL`. faulthandler's handler is native: it
    needs neither the GIL nor the main thread. Forked children inherit it.
    """
    try:
        DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        file = open(_file(os.getpid()), "w")  # noqa: SIM115 (open as long as the process lives)
    except OSError as error:  # a full disk, another user's directory: training does not need it
        log.warning("this process can't write its stacks: %s", error)
        return
    _files[:] = [file]
    faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
    answer_questions(_socket(os.getpid()))


def collect(pids: Iterable[int]) -> dict[int, Stacks]:
    """Return the stacks of these processes of this machine, and of their children."""
    return {pid: _of(pid) for pid in pids}


def kill(pids: Iterable[int]) -> None:
    """End processes of this machine at once; stopped ones too."""
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
    # Read last: a process that gets SIGSTOP stops a moment later.
    return Stacks(state(pid), "\n".join(filter(None, parts)), tuple(last))


def _python(pid: int) -> str:
    """What faulthandler writes after the signal; a stopped process writes nothing."""
    file = _file(pid)
    if not file.exists() or not _catches(pid):
        return "no Python stacks: the process has not begun to answer signals"
    # One after the other: they all write to the file of the first one.
    texts = [_asked(one, file) for one in [pid, *filter(_catches, children(pid))]]
    return "\n".join(filter(None, texts)) or "no Python stacks: the process does not react to signals"


def _asked(pid: int, file: Path) -> str:
    """What a process appends to a file after the signal."""
    before = file.stat().st_size
    try:
        os.kill(pid, SIGNAL)
    except OSError as error:
        return f"no Python stacks: {error}"
    return "" if state(pid) in STOPPED else _written(file, before)


def _written(file: Path, start: int) -> str:
    """What is appended to a file until it grows no more; there is no event to wait for."""
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
    """Whether a process has a handler for the signal, which would end it otherwise."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False


def _native(pid: int) -> str:
    """Native stacks by py-spy, where it is installed and may trace the process."""
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
