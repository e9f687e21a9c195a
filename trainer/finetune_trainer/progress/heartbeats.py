"""Sends the heartbeat of each worker to the driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from finetune_trainer.heartbeat import IDLE, Heartbeat, Phase
from finetune_trainer.progress.process_activity import activity

POLL_SECONDS = 0.5
ACTIVITY_SECONDS = 1.0


@dataclass(frozen=True)
class WorkerHeartbeat:
    """A heartbeat of one worker."""

    rank: int
    workers: int
    """World size."""
    pid: int
    host: str
    """Name of its node in Kubernetes, or of the machine."""
    node: str
    """Ray's id of its node."""
    progress: int
    """Grows with each unit of work."""
    phase: Phase


class HeartbeatThread:
    """Sends this process's heartbeat whenever it changes, at most twice a second. A context manager.

    The thread keeps running in a worker that hangs in Python or in native code that has released the GIL; it then sends
    nothing, because nothing changes.

    Args:
        initial: the heartbeat before any work, by `first_heartbeat`.
        send: receives each `WorkerHeartbeat`; must not block.
    """

    def __init__(self, initial: WorkerHeartbeat, heartbeat: Heartbeat, send: Callable[[WorkerHeartbeat], None]) -> None:
        self._initial, self._heartbeat, self._send = initial, heartbeat, send
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> HeartbeatThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        process = _ProcessActivity()
        progress, seen = 0, (-1, self._heartbeat.phase)
        while True:
            now = self._heartbeat.count, self._heartbeat.phase
            worked = process.has_worked(now[1].measured)
            if now != seen or worked:
                progress, seen = progress + 1, now
                self._send(replace(self._initial, progress=progress, phase=now[1]))
            if self._closed.wait(POLL_SECONDS):
                return


class _ProcessActivity:
    """Whether this process works, sampled about once a second."""

    def __init__(self) -> None:
        self._last, self._sampled_at = activity(), time.monotonic()

    def has_worked(self, measured: bool) -> bool:
        """Whether the process has worked since the last sample; False in a measured phase."""
        now = time.monotonic()
        if now - self._sampled_at < ACTIVITY_SECONDS:
            return False
        current = activity()
        worked = not measured and current.works_since(self._last, now - self._sampled_at)
        self._last, self._sampled_at = current, now
        return worked


def first_heartbeat(rank: int, workers: int, host: str, node: str) -> WorkerHeartbeat:
    """Return the heartbeat of this process before it has done any work."""
    return WorkerHeartbeat(rank, workers, os.getpid(), host, node, 0, IDLE)
