"""Lists one kind of object, watches it, and lists again where the watch has lost the thread (client-go's Reflector).

Kopf watches the FineTuneJobs. Their runs and pods are watched here, for three things that kopf does not do: a list is
read in pages, and each object kept as its small view alone; what went while no watch was open is dropped after the
next list; and thousands of objects at the start cost no more than once each.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Generic, TypeVar

import aiohttp
from kubernetes.aio.client import ApiException

from finetune_operator.api import PAGE, Api, Json

WATCH_SECONDS = 300
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.2, 5.0
EXPIRED = 410
log = logging.getLogger(__name__)
View = TypeVar("View")
Name = tuple[str, str]
"""Namespace and name of an object."""


class Expired(Exception):
    """The API server does not remember that far back: list again."""


class Reflector(Generic[View]):
    """Keeps somebody's views of the objects at `path` fresh.

    Args:
        path: of the list, without a query.
        selector: label selector.
        view: the view of an object; None for one that is nobody's business.
        put: is called for each view that is new or has changed.
        drop: is called for each whose object is gone.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        selector: str,
        view: Callable[[Json], View | None],
        put: Callable[[str, View], None],
        drop: Callable[[str, View], None],
    ) -> None:
        self._api, self._path, self._query = api, path, f"labelSelector={selector}"
        self._view, self._put, self._drop = view, put, drop
        self._known: dict[Name, View] = {}
        self._version = ""
        self.listed = asyncio.Event()
        """Set once everything that there is has been told."""

    async def run(self) -> None:
        """Until cancelled. What went wrong, or was over at once, is tried again after a pause that doubles."""
        pause, clock = FIRST_PAUSE_SECONDS, asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except Expired:
                log.info("%s: the watch has expired: listing again", self._path)
                self._version = ""
            except (ApiException, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                log.info("%s: %s: %s", self._path, type(error).__name__, getattr(error, "reason", error))
            if clock() - began > LAST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    async def _list(self) -> None:
        """All objects, page by page; those that are there no more are dropped."""
        found: set[Name] = set()
        before, more, version = set(self._known), "", ""
        while True:
            try:
                page = await self._api.get(f"{self._path}?{self._query}&limit={PAGE}{more}") or {}
            except ApiException as error:
                if error.status == EXPIRED:
                    raise Expired from error
                raise
            found |= {self._tell(item) for item in page.get("items", [])}
            version = version or page["metadata"]["resourceVersion"]
            if not page["metadata"].get("continue"):
                break
            more = f"&continue={page['metadata']['continue']}"
        for name in before - found:
            self._forget(name)
        self._version = version
        self.listed.set()

    async def _watch(self) -> None:
        """Until the API server ends the watch, as it does every few minutes."""
        query = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={self._version}"
        async for event in self._api.stream(f"{self._path}?{self._query}&{query}", WATCH_SECONDS):
            item = event["object"]
            if event["type"] == "ERROR":
                if item.get("code") == EXPIRED:
                    raise Expired
                raise ApiException(status=item.get("code"), reason=item.get("message"))
            self._version = item["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._tell(item)  # its last state may say how it ended
                self._forget((item["metadata"]["namespace"], item["metadata"]["name"]))
            elif event["type"] != "BOOKMARK":
                self._tell(item)

    def _tell(self, item: Json) -> Name:
        name = (item["metadata"]["namespace"], item["metadata"]["name"])
        view = self._view(item)
        if view is None:
            self._forget(name)
        elif self._known.get(name) != view:
            self._known[name] = view
            self._put(name[0], view)
        return name

    def _forget(self, name: Name) -> None:
        view = self._known.pop(name, None)
        if view is not None:
            self._drop(name[0], view)
