"""The pulse of each worker on its way to the driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from finetune_trainer.heartbeat import Phase, Pulse
from finetune_trainer.progress.process_activity import activity

LOOK_SECONDS = 0.5
WORK_SECONDS = 1.0


@dataclass(frozen=True)
class Beat:
    """How one worker stands."""

    rank: int
    workers: int
    """How many there are."""
    pid: int
    host: str
    """Name of its node as Kubernetes or the machine has it."""
    node: str
    """Ray's id of its node."""
    progress: int
    """Grows whenever the worker gets on."""
    phase: Phase


class PulseThread:
    """Tells of this process's pulse until closed, whenever it changes and at most twice a second.

    It is alive in a worker that hangs in Python or in native code that has released the GIL, and tells nothing then.

    Args:
        send: receives each `Beat`; must not wait.
    """

    def __init__(self, place: Beat, pulse: Pulse, send: Callable[[Beat], None]) -> None:
        self._place, self._pulse, self._send = place, pulse, send
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")

    def __enter__(self) -> PulseThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        work = _Work()
        progress, seen = 0, (-1, self._pulse.phase)
        while True:
            beats, phase = self._pulse.beats, self._pulse.phase
            worked = work.goes_on(phase.measured)
            if (beats, phase) != seen or worked:
                progress, seen = progress + 1, (beats, phase)
                place = self._place
                self._send(Beat(place.rank, place.workers, place.pid, place.host, place.node, progress, phase))
            if self._over.wait(LOOK_SECONDS):
                return


class _Work:
    """Whether this process works, looked at about once a second."""

    def __init__(self) -> None:
        self._before, self._then = activity(), time.monotonic()

    def goes_on(self, measured: bool) -> bool:
        """Whether it worked since the last look; never in a measured phase."""
        now = time.monotonic()
        if now - self._then < WORK_SECONDS:
            return False
        after = activity()
        worked = not measured and after.works_since(self._before, now - self._then)
        self._before, self._then = after, now
        return worked


def place_of(rank: int, workers: int, host: str, node: str) -> Beat:
    """Return the beat of this process before it has done anything."""
    return Beat(rank, workers, os.getpid(), host, node, 0, Phase("starting"))
