"""Asks the running attempts how they do, at their own HTTP port.

Progress comes by this way, and not through the API server, for three reasons: it costs the API server nothing, a
pod needs no rights there, and an attempt runs on when the operator is down.

A pod runs its user's code, so nothing that it answers is trusted: not its size, not its pace, not where it points to.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from finetune_api.report import PORT, REPORT_PATH, STOP_PATH, AttemptReport
from finetune_operator.core.report_validation import read_report
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodView
from finetune_operator.observe.cache import Cache, Key
from finetune_operator.render.support import token

TIMEOUT_SECONDS = 3.0
LARGEST_REPORT = 256 * 1024
AT_ONCE = 64
POLLS_PER_SECOND = 50.0
"""Most, all pods together: with thousands of them each is asked less often."""
LONGEST_PAUSE = 60.0
"""Until a pod that did not answer is asked again."""
ROUND_SECONDS = 1.0
log = logging.getLogger(__name__)
Driver = tuple[Key, str]
"""A job's key and the name of its driver's pod."""


@dataclass
class _Pace:
    """When a pod is asked next, and how often in a row it did not answer."""

    due: float
    silent: int = 0
    asking: bool = False


class Poller:
    """Keeps the cache's reports fresh; `changed(key)` is called where one has changed."""

    def __init__(self, cache: Cache, settings: Settings, changed: Callable[[Key], None]) -> None:
        self._cache, self._settings, self._changed = cache, settings, changed
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._paces: dict[Driver, _Pace] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)

    async def run(self) -> None:
        """Until cancelled: every second, or more often where that is the setting, ask whoever is due."""
        try:
            while True:
                self._round()
                await asyncio.sleep(min(self._settings.poll_seconds, ROUND_SECONDS))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._http.close()

    async def stop(self, key: Key, run: int) -> bool:
        """Ask an attempt to save a checkpoint and end; whether it heard."""
        for found, pod in self._cache.drivers():
            if found == key and pod.run == run:
                try:
                    async with self._http.post(
                        _url(pod, STOP_PATH), headers=self._headers(key, pod), allow_redirects=False
                    ) as answer:
                        return answer.status == 202
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.info("%s/%s: attempt %d did not hear the wish to stop: %s", *key, run, error)
        return False

    def _round(self) -> None:
        drivers = {(key, pod.name): pod for key, pod in self._cache.drivers()}
        now, least = asyncio.get_running_loop().time(), len(drivers) / POLLS_PER_SECOND
        self._paces = {
            driver: self._paces.get(driver) or _Pace(now + random.uniform(0, least)) for driver in drivers
        }  # those that come at once, after a restart say, are spread
        for driver, pace in self._paces.items():
            if pace.due <= now and not pace.asking:
                pace.asking = True
                task = asyncio.create_task(self._ask(driver[0], drivers[driver], pace, least))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _ask(self, key: Key, pod: PodView, pace: _Pace, least: float) -> None:
        report = None
        try:
            async with self._limit:
                report = await self._report(key, pod)
        finally:  # whatever went wrong, the pod is asked again
            pace.silent = pace.silent + 1 if report is None else 0
            pause = min(self._settings.poll_seconds * 2 ** min(pace.silent, 16), LONGEST_PAUSE)
            pace.due = asyncio.get_running_loop().time() + max(pause, least, self._settings.poll_seconds)
            pace.asking = False
        if report is not None and self._cache.reports.get(key) != (pod.run, report):
            self._cache.reports[key] = (pod.run, report)
            self._changed(key)

    async def _report(self, key: Key, pod: PodView) -> AttemptReport | None:
        """What the attempt says; None where it says nothing yet, or nothing that can be read."""
        try:
            async with self._http.get(
                _url(pod, REPORT_PATH), headers=self._headers(key, pod), allow_redirects=False
            ) as answer:
                if answer.status != 200:
                    return None
                return read_report(await _body(answer))
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    def _headers(self, key: Key, pod: PodView) -> dict[str, str]:
        job = self._cache.jobs.get(key)
        secret = token(self._settings.token_key, job.uid if job else "", pod.run)
        return {"Authorization": f"Bearer {secret}"}


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """The answer's body; empty where it is larger than any report."""
    body = b""
    async for piece in answer.content.iter_chunked(16 * 1024):
        body += piece
        if len(body) > LARGEST_REPORT:
            return b""
    return body


def _url(pod: PodView, path: str) -> str:
    host = f"[{pod.ip}]" if ":" in (pod.ip or "") else pod.ip
    return f"http://{host}:{PORT}{path}"
