"""Decide when a group of workers counts as stalled, and which of them is behind. Pure: no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from finetune_api.cluster import AUTO
from finetune_trainer.progress.heartbeats import WorkerHeartbeat

LEAST_SECONDS = 600.0
BEGIN_SECONDS = 600.0
"""Minimum timeout of the first heartbeat after Ray has placed the workers: they import libraries and rendezvous."""
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
    def begun(self) -> bool:
        """Whether any worker has sent a heartbeat."""
        return bool(self.beats)

    @property
    def culprit(self) -> int:
        """The rank that is behind: one without a heartbeat, else the lowest step and phase of those not waiting."""
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
    """Detects a stall from the workers' heartbeats.

    Args:
        timeout: `runPolicy.stallTimeout`.
        workers: number of workers, as far as it is known before the first heartbeat.
    """

    def __init__(self, timeout: int | str, workers: int = 1) -> None:
        self._timeout, self._workers = timeout, workers
        self._placed: float | None = None
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

    def look(self, now: float, beats: Mapping[int, WorkerHeartbeat], queued: bool = False) -> Stall | None:
        """Return the stall, or None if there is none.

        Before the first heartbeat of any worker the limit is at least `BEGIN_SECONDS`, counted from when the workers
        are no longer queued.

        Args:
            now: seconds of a monotonic clock.
            beats: the latest heartbeat of each worker, by rank.
            queued: whether the workers still wait for resources of the cluster.
        """
        progress = {rank: beat.progress for rank, beat in beats.items()}
        if progress != self._progress:
            self._progress, self._beats, self._since = progress, dict(beats), now
            self._count_step(now)
        limit = self.limit
        if self._since is None:
            return None if limit is None else self._not_begun(now, max(limit, BEGIN_SECONDS), queued)
        if limit is None or now - self._since < limit:
            return None
        return Stall(now - self._since, self._beats, next(iter(self._beats.values())).workers)

    def _not_begun(self, now: float, limit: float, queued: bool) -> Stall | None:
        if self._placed is None or queued:
            self._placed = now
        waited = now - self._placed
        return Stall(waited, {}, self._workers) if waited >= limit else None

    def _count_step(self, now: float) -> None:
        step = max(beat.phase.step for beat in self._beats.values())
        if self._step is None or step < self._step[0]:
            self._step = step, now
        elif step > self._step[0]:
            done, then = self._step
            self._steps.append((now - then) / (step - done))
            self._step = step, now
