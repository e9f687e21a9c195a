"""A work queue of job keys: each key is queued once and handled by one worker at a time (client-go's `workqueue`).

A change of a run or a pod leads to a reconcile of the FineTuneJob that owns it. Kopf's handlers are bound to the object
that has changed, so keys are queued here instead.
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
    """Runs `work(key)` for queued keys with `workers` tasks, and retries failures with exponential backoff."""

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
        """Start the workers, unless they have been started."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._run(), name=f"reconcile-{n}") for n in range(self._workers)]

    async def stop(self) -> None:
        """Cancel the timers and the workers, with what they are doing."""
        for timer in self._timers.values():
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, key: Key) -> None:
        """Queue the job."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Queue the job after `seconds`, or earlier if it already has an earlier timer."""
        loop = asyncio.get_running_loop()
        when, timer = loop.time() + max(seconds, 0), self._timers.get(key)
        if timer is not None and timer.when() <= when:
            return
        if timer is not None:
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._due, key)

    def forget(self, key: Key) -> None:
        """Remove the timer and the failure count of a deleted job."""
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
        except Exception as error:  # an error of one job must not stop the workers
            self._failures[key] += 1
            pause = min(FIRST_RETRY_SECONDS * 2 ** (self._failures[key] - 1), LAST_RETRY_SECONDS)
            log.warning("%s/%s: %s: %s; retry in %.1f s", *key, type(error).__name__, error, pause)
            self.add_after(key, pause * random.uniform(0.8, 1.2))
