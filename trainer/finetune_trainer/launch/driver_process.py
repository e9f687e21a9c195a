"""Run the driver as a separate process, watched by its parent process.

The driver watches its own work (`driver_watch`), but a process that is stopped by a signal or a debugger runs no
threads. So the pod's first process polls the state of the driver, and kills it if it stays stopped. This needs no
network, so a network outage never ends a driver.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from finetune_trainer.forks.client import run_child, run_fork
from finetune_trainer.launch.stack_dumps import STOPPED, Stacks
from finetune_trainer.launch.stall_watch import StallWatch
from finetune_trainer.progress.process_activity import state

LOOK_SECONDS = 1.0


class StoppedWatch:
    """A context manager that kills a process that stays stopped for too long, from a thread.

    Args:
        timeout: `runPolicy.stallTimeout`.
    """

    def __init__(self, timeout: int | str) -> None:
        self._limit = StallWatch(timeout).limit
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.found = ""
        """Why the process was killed; empty if it was not."""

    def __enter__(self) -> StoppedWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def begun(self, pid: int) -> None:
        """Watch this process from now on."""
        if self._limit is not None:
            self._thread = threading.Thread(target=self._run, args=(pid, self._limit), daemon=True)
            self._thread.start()

    def _run(self, pid: int, limit: float) -> None:
        runs = time.monotonic()
        while not self._over.wait(LOOK_SECONDS):
            seen = state(pid)
            if seen not in STOPPED:
                runs = time.monotonic()
            elif time.monotonic() - runs >= limit:
                self.found = f"no progress of the driver for {limit:.0f} s: process {pid} is {Stacks(seen, '').told}"
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                return


def run_watched(argv: Sequence[str], watch: StoppedWatch) -> int:
    """Run a script as a fork if there is a fork server, else as a child; return its exit status.

    SIGTERM and SIGINT are forwarded to it.

    Args:
        argv: path of the script and its arguments.
    """
    with watch:
        code = run_fork(list(argv), watch.begun)
        return run_child(argv, watch.begun) if code is None else code
