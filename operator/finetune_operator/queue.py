"""Which jobs to look at, and when: each at most once at a time, however often it was asked for.

Kopf's own handlers are for one object's changes; here a change of a run or a pod is a reason to look at the
FineTuneJob that owns it, so keys are queued, as controllers in Go do (client-go's `workqueue`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable

from finetune_operator.observe.cache import Key

FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0
log = logging.getLogger(__name__)


class WorkQueue:
    """Runs `work(key)` for queued keys, `workers` at a time; a failure is tried again after a growing pause."""

    def __init__(self, work: Callable[[Key], Awaitable[None]], workers: int = 16) -> None:
        self._work, self._workers = work, workers
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._busy: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: defaultdict[Key, int] = defaultdict(int)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work; doing it again changes nothing."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run(), name=f"reconcile-{n}") for n in range(self._workers)]

    async def stop(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, key: Key) -> None:
        """Look at the job as soon as possible."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at the job then, or earlier if it was to be looked at earlier."""
        loop = asyncio.get_running_loop()
        when, timer = loop.time() + max(seconds, 0), self._timers.get(key)
        if timer is not None and timer.when() <= when:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._due, key)

    def forget(self, key: Key) -> None:
        """The job is gone."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        self._failures.pop(key, None)

    def _due(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    async def _run(self) -> None:
        while True:
            key = await self._ready.get()
            self._queued.discard(key)
            self._busy.add(key)
            try:
                await self._try(key)
            finally:
                self._busy.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    async def _try(self, key: Key) -> None:
        try:
            await self._work(key)
            self._failures.pop(key, None)
        except Exception as error:  # the edge: whatever went wrong with one job must not stop the others
            self._failures[key] += 1
            pause = min(FIRST_RETRY_SECONDS * 2 ** (self._failures[key] - 1), LAST_RETRY_SECONDS)
            log.warning("%s/%s: %s: %s; again in %.1f s", *key, type(error).__name__, error, pause)
            self.add_after(key, pause * random.uniform(0.8, 1.2))
