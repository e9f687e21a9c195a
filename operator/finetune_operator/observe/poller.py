"""Poll the progress reports of running attempts over HTTP.

Reports do not go through the API server, for three reasons: polls put no load on it, a pod needs no RBAC rights, and an
attempt keeps running while the operator is down.

A pod runs its user's code, so its answers are not trusted: their size and time are limited, and redirects are not
followed.
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
"""Maximum rate, all pods together: with thousands of pods each is polled less often."""
LONGEST_PAUSE = 60.0
"""Maximum time until a pod that did not answer is polled again."""
ROUND_SECONDS = 1.0
log = logging.getLogger(__name__)
Driver = tuple[Key, str]
"""A job's key and the name of its driver pod."""


@dataclass
class _Pace:
    """When a pod is polled next, and how many polls in a row had no answer."""

    due: float
    unanswered: int = 0
    polling: bool = False


class Poller:
    """Keeps the cache's reports up to date and calls `changed(key)` when a report has changed."""

    def __init__(self, cache: Cache, settings: Settings, changed: Callable[[Key], None]) -> None:
        self._cache, self._settings, self._changed = cache, settings, changed
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._paces: dict[Driver, _Pace] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)

    async def run(self) -> None:
        """Poll the pods that are due until cancelled: every second, or every `poll_seconds` if that is less."""
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
        """Ask an attempt to save a checkpoint and stop; return whether it accepted the request."""
        for found, pod in self._cache.drivers():
            if found == key and pod.run == run:
                try:
                    async with self._http.post(
                        _url(pod, STOP_PATH), headers=self._headers(key, pod), allow_redirects=False
                    ) as answer:
                        log.info("%s/%s: attempt %d is asked to stop: HTTP %d", *key, run, answer.status)
                        return answer.status == 202
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.info("%s/%s: attempt %d cannot be asked to stop: %s", *key, run, error)
        return False

    def _round(self) -> None:
        drivers = {(key, pod.name): pod for key, pod in self._cache.drivers()}
        now, least = asyncio.get_running_loop().time(), len(drivers) / POLLS_PER_SECOND
        self._paces = {
            driver: self._paces.get(driver) or _Pace(now + random.uniform(0, least)) for driver in drivers
        }  # polls of pods that appear at the same time, for example after a restart, are spread
        for driver, pace in self._paces.items():
            if pace.due <= now and not pace.polling:
                pace.polling = True
                task = asyncio.create_task(self._poll(driver[0], drivers[driver], pace, least))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _poll(self, key: Key, pod: PodView, pace: _Pace, least: float) -> None:
        report = None
        try:
            async with self._limit:
                report = await self._report(key, pod)
        finally:  # also after an error the pod is polled again
            pace.unanswered = pace.unanswered + 1 if report is None else 0
            pause = min(self._settings.poll_seconds * 2 ** min(pace.unanswered, 16), LONGEST_PAUSE)
            pace.due = asyncio.get_running_loop().time() + max(pause, least, self._settings.poll_seconds)
            pace.polling = False
        if report is not None and self._cache.reports.get(key) != (pod.run, report):
            self._cache.reports[key] = (pod.run, report)
            self._changed(key)

    async def _report(self, key: Key, pod: PodView) -> AttemptReport | None:
        """Return the attempt's report, or None if there is no answer or no valid report."""
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
    """Return the answer's body; empty if it is larger than `LARGEST_REPORT`."""
    body = b""
    async for piece in answer.content.iter_chunked(16 * 1024):
        body += piece
        if len(body) > LARGEST_REPORT:
            return b""
    return body


def _url(pod: PodView, path: str) -> str:
    host = f"[{pod.ip}]" if ":" in (pod.ip or "") else pod.ip
    return f"http://{host}:{PORT}{path}"
