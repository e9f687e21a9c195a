"""Watch the driver's own work: preparing data, training a tokenizer, reading storage, writing the report.

A thread that hangs in a read cannot be interrupted, so a driver that makes no progress ends its own process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from finetune_api.exit_codes import ExitCode
from finetune_trainer.heartbeat import in_phase, process_heartbeat
from finetune_trainer.launch.stall_watch import StallWatch
from finetune_trainer.progress.heartbeats import HeartbeatThread, WorkerHeartbeat, first_heartbeat
from finetune_trainer.runtime import node_name

LOOK_SECONDS = 0.5
P = ParamSpec("P")
T = TypeVar("T")


class DriverWatch:
    """A context manager that calls `hung` from another thread if this process makes no progress.

    Args:
        timeout: `runPolicy.stallTimeout`.
        hung: receives the diagnosis, with the stacks of all threads, and should end the process.
    """

    def __init__(self, timeout: int | str, hung: Callable[[str], None]) -> None:
        self._timeout, self._hung = timeout, hung
        self._beats: dict[int, WorkerHeartbeat] = {}
        self._watch: StallWatch | None = StallWatch(timeout)
        self._over = threading.Event()
        self._pulse = HeartbeatThread(first_heartbeat(0, 1, node_name(), ""), process_heartbeat(), self._hear)
        self._thread = threading.Thread(target=self._run, daemon=True, name="driver watch")

    def __enter__(self) -> DriverWatch:
        self._pulse.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._pulse.__exit__()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the watch while the driver waits for workers, which are watched separately."""
        self._watch = None
        try:
            yield
        finally:
            self._watch = StallWatch(self._timeout)

    def unwatched(self, wait: Callable[P, T]) -> Callable[P, T]:
        """Return a function that calls `wait` with the watch paused."""

        def waiting(*args: P.args, **options: P.kwargs) -> T:
            with self.paused():
                return wait(*args, **options)

        return waiting

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch a short call to the workers or to storage while the watch is otherwise paused.

        If such a call hangs, Ray on this node or the job's store hangs.
        """
        with in_phase("waiting for messages of the workers", measured=True):
            self._watch = StallWatch(self._timeout)
            try:
                yield
            finally:
                self._watch = None

    def _hear(self, beat: WorkerHeartbeat) -> None:
        self._beats = {0: beat}

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            watch = self._watch
            stall = None if watch is None else watch.look(time.monotonic(), self._beats)
            if stall is not None:
                words = f"no progress of the driver for {stall.seconds:.0f} s while {stall.beats[0].phase.name}"
                self._hung(f"{words}; its stacks:\n{_stacks()}")
                return


def end_process(text: str) -> None:
    """Print the diagnosis and end this process at once."""
    print(f"stalled: {text}", file=sys.stderr, flush=True)
    os._exit(ExitCode.FAILED)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
