"""Asks the running attempts how they do, at their own HTTP port.

Progress comes by this way, and not through the API server, for three reasons: it costs the API server nothing, a
pod needs no rights there, and an attempt runs on when the operator is down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from finetune_api.report import PORT, REPORT_PATH, STOP_PATH, AttemptReport
from finetune_operator.cache import Cache, Key
from finetune_operator.observed import PodView
from finetune_operator.render.support import token
from finetune_operator.settings import Settings

TIMEOUT_SECONDS = 3.0
LARGEST_REPORT = 256 * 1024
AT_ONCE = 64
log = logging.getLogger(__name__)


class Poller:
    """Keeps the cache's reports fresh; `changed(key)` is called where one has changed."""

    def __init__(self, cache: Cache, settings: Settings, changed: Callable[[Key], None]) -> None:
        self._cache, self._settings, self._changed = cache, settings, changed
        self._limit = asyncio.Semaphore(AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)

    async def run(self) -> None:
        """Until cancelled: a round over all running attempts, then a pause."""
        try:
            while True:
                await asyncio.gather(*(self._ask(key, pod) for key, pod in list(self._cache.drivers())))
                await asyncio.sleep(self._settings.poll_seconds)
        finally:
            await self._http.close()

    async def stop(self, key: Key, run: int) -> bool:
        """Ask an attempt to save a checkpoint and end; whether it heard."""
        for found, pod in self._cache.drivers():
            if found == key and pod.run == run:
                try:
                    async with self._http.post(_url(pod, STOP_PATH), headers=self._headers(key, pod)) as answer:
                        return answer.status == 202
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.info("%s/%s: attempt %d did not hear the wish to stop: %s", *key, run, error)
        return False

    async def _ask(self, key: Key, pod: PodView) -> None:
        async with self._limit:
            report = await self._report(key, pod)
        if report is not None and self._cache.reports.get(key) != (pod.run, report):
            self._cache.reports[key] = (pod.run, report)
            self._changed(key)

    async def _report(self, key: Key, pod: PodView) -> AttemptReport | None:
        """What the attempt says; None where it says nothing yet, or nothing that can be read."""
        try:
            async with self._http.get(_url(pod, REPORT_PATH), headers=self._headers(key, pod)) as answer:
                if answer.status != 200:
                    return None
                text = await answer.content.read(LARGEST_REPORT)
            return AttemptReport.model_validate_json(text)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None

    def _headers(self, key: Key, pod: PodView) -> dict[str, str]:
        job = self._cache.jobs.get(key)
        secret = token(self._settings.token_key, job.uid if job else "", pod.run)
        return {"Authorization": f"Bearer {secret}"}


def _url(pod: PodView, path: str) -> str:
    host = f"[{pod.ip}]" if ":" in (pod.ip or "") else pod.ip
    return f"http://{host}:{PORT}{path}"
