"""List and watch one kind of object, and list again when the watch has expired (client-go's Reflector).

Kopf watches the FineTuneJobs. Runs and pods are watched here for two reasons. When a watch has expired (410 Gone), kopf
lists again and emits no event for objects that were deleted in the meantime; the deletion of a run or pod is the only
sign of some failures, so it must not be missed. And kopf starts a task for each object that has an event, and keeps a
memo of each object until its deletion; with thousands of pods that is most of the operator's memory and of its
start-up time, while this module keeps a small view of each object and no task.
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
    """The resource version is too old for a watch: list again."""


class Reflector(Generic[View]):
    """Keeps views of the objects at `path` up to date.

    Args:
        path: URL path of the list, without a query.
        selector: Label selector.
        view: Returns the view of an object, or None for an object to ignore.
        put: Called with namespace and view for each view that is new or has changed.
        drop: Called with namespace and last view for each object that was deleted.
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
        """Set once `put` has been called for every object of the first list."""

    async def run(self) -> None:
        """List and watch until cancelled; retry errors and watches that end at once with exponential backoff."""
        pause, clock = FIRST_PAUSE_SECONDS, asyncio.get_running_loop().time
        while True:
            started = clock()
            try:
                if not self._version:
                    await self._list()
                await self._watch()
            except Expired:
                log.info("%s: the watch has expired: listing again", self._path)
                self._version = ""
            except (ApiException, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                log.info("%s: %s: %s", self._path, type(error).__name__, getattr(error, "reason", error))
            if clock() - started > LAST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    async def _list(self) -> None:
        """Read all objects in pages, and drop those that no longer exist."""
        found: set[Name] = set()
        before, more, version = set(self._known), "", ""
        while True:
            try:
                page = await self._api.get(f"{self._path}?{self._query}&limit={PAGE}{more}") or {}
            except ApiException as error:
                if error.status == EXPIRED:
                    raise Expired from error
                raise
            found |= {self._put_view(item) for item in page.get("items", [])}
            version = version or page["metadata"]["resourceVersion"]
            if not page["metadata"].get("continue"):
                break
            more = f"&continue={page['metadata']['continue']}"
        for name in before - found:
            self._forget(name)
        self._version = version
        self.listed.set()

    async def _watch(self) -> None:
        """Follow a watch until the API server ends it, after `WATCH_SECONDS` at most."""
        query = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}&resourceVersion={self._version}"
        async for event in self._api.stream(f"{self._path}?{self._query}&{query}", WATCH_SECONDS):
            item = event["object"]
            if event["type"] == "ERROR":
                if item.get("code") == EXPIRED:
                    raise Expired
                raise ApiException(status=item.get("code"), reason=item.get("message"))
            self._version = item["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._put_view(item)  # the last state may have the reason of its end
                self._forget((item["metadata"]["namespace"], item["metadata"]["name"]))
            elif event["type"] != "BOOKMARK":
                self._put_view(item)

    def _put_view(self, item: Json) -> Name:
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
