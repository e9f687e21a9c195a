"""Decides when a group of workers counts as stalled, and which of them is behind. Pure: it does no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from finetune_api.cluster import AUTO
from finetune_trainer.progress.heartbeats import WorkerHeartbeat

LEAST_SECONDS = 600.0
STEPS = 30
"""The automatic timeout is the median duration of a step times this, and at least `LEAST_SECONDS`."""
WINDOW = 50


@dataclass(frozen=True)
class Stall:
    """A group of workers that makes no progress."""

    seconds: float
    """Seconds since the last progress."""
    beats: dict[int, WorkerHeartbeat]
    """The last heartbeat of each worker, by rank; workers that have sent none are missing."""
    workers: int

    @property
    def culprit(self) -> int:
        """The rank that is behind: one that never began, else the lowest step and phase of those that do not wait."""
        missing = [rank for rank in range(self.workers) if rank not in self.beats]
        if missing:
            return missing[0]
        busy = [beat for beat in self.beats.values() if not beat.phase.waits] or list(self.beats.values())
        return min(busy, key=lambda beat: (beat.phase.step, beat.phase.order, beat.progress)).rank

    def words(self, rank: int) -> str:
        """Return a description of the worker and its last operation."""
        beat = self.beats.get(rank)
        if beat is None:
            return f"worker {rank}: has not begun"
        return f"worker {rank} on node {beat.host} (process {beat.pid}): step {beat.phase.step + 1}, {beat.phase.name}"


class StallWatch:
    """Detects from the workers' heartbeats that there has been no progress for too long.

    Args:
        timeout: `runPolicy.stallTimeout`.
    """

    def __init__(self, timeout: int | str) -> None:
        self._timeout = timeout
        self._progress: dict[int, int] = {}
        self._beats: dict[int, WorkerHeartbeat] = {}
        self._since: float | None = None
        self._step: tuple[int, float] | None = None
        self._steps: deque[float] = deque(maxlen=WINDOW)

    @property
    def limit(self) -> float | None:
        """Seconds without progress that count as a stall; None if the watch is off."""
        if self._timeout == AUTO:
            return max(LEAST_SECONDS, STEPS * median(self._steps)) if self._steps else LEAST_SECONDS
        return float(self._timeout) or None

    def look(self, now: float, beats: Mapping[int, WorkerHeartbeat]) -> Stall | None:
        """Return the stall, or None if there is none. The watch begins with the first heartbeat of any worker.

        Args:
            now: seconds of a monotonic clock.
            beats: the latest heartbeat of each worker, by rank.
        """
        progress = {rank: beat.progress for rank, beat in beats.items()}
        if progress != self._progress:
            self._progress, self._beats, self._since = progress, dict(beats), now
            self._count_step(now)
        limit = self.limit
        if self._since is None or limit is None or now - self._since < limit:
            return None
        return Stall(now - self._since, self._beats, next(iter(self._beats.values())).workers)

    def _count_step(self, now: float) -> None:
        step = max(beat.phase.step for beat in self._beats.values())
        if self._step is None or step < self._step[0]:
            self._step = step, now
        elif step > self._step[0]:
            done, then = self._step
            self._steps.append((now - then) / (step - done))
            self._step = step, now
