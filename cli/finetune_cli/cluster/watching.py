"""List and watch objects; reconnect after the connection is lost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from finetune_cli.cluster.connection import Cluster, Query
from finetune_cli.cluster.errors import GONE, ApiError, Unreachable

Json = dict[str, Any]
Objects = dict[tuple[str, str], Json]
WATCH_SECONDS = 60
"""Duration of one watch request. A dead connection is detected after this time."""
SLACK_SECONDS = 15
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0


def no_note(_: str) -> None:
    """Ignore messages about the connection."""


def follow(
    cluster: Cluster,
    path: str,
    query: Query,
    *,
    deadline: float | None = None,
    note: Callable[[str], None] = no_note,
) -> Iterator[Objects]:
    """Yield the listed objects by namespace and name, now and after each change.

    Args:
        path: path of the list.
        query: selectors.
        deadline: end of the watch in `time.monotonic()` seconds. None: never.
        note: called with a message when the connection is lost, and with "" when it is restored.

    Raises:
        ApiError: the API server rejects the request permanently, or rejects the first list.
        Unreachable: the API server does not respond to the first list.
    """
    seen: Objects | None = None
    version: str | None = None
    pause = FIRST_PAUSE
    while seen is None or deadline is None or time.monotonic() < deadline:
        try:
            if version is None:
                seen, version = _listed(cluster, path, query)
                note("")
                yield seen
            assert seen is not None
            for event in _events(cluster, path, query | {"resourceVersion": version}, deadline):
                pause = FIRST_PAUSE
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    _apply(seen, event)
                    note("")
                    yield seen
            continue
        except (ApiError, Unreachable) as error:
            if seen is None or (isinstance(error, ApiError) and not error.transient):
                raise
            if isinstance(error, ApiError) and error.code == GONE:
                version = None
            lost = error
        if deadline is None or time.monotonic() + pause < deadline:
            note(f"connection lost ({lost}), reconnecting")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _listed(cluster: Cluster, path: str, query: Query) -> tuple[Objects, str]:
    found = cluster.get(path, query)
    kind = {"apiVersion": found["apiVersion"], "kind": found["kind"].removesuffix("List")}
    return {_key(item): kind | item for item in found["items"]}, found["metadata"]["resourceVersion"]


def _events(cluster: Cluster, path: str, query: Query, deadline: float | None) -> Iterator[Json]:
    seconds = float(WATCH_SECONDS)
    if deadline is not None:
        seconds = min(seconds, max(deadline - time.monotonic(), 0.01))
    query = query | {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(math.ceil(seconds))}
    idle = seconds if deadline is not None and seconds < WATCH_SECONDS else seconds + SLACK_SECONDS
    try:
        for line in cluster.lines(path, query, idle):
            event = json.loads(line)
            if event["type"] == "ERROR":
                status = event["object"]
                raise ApiError(status.get("code", 500), status.get("reason", ""), status.get("message", ""), {})
            yield event
    except Unreachable:
        if deadline is None or time.monotonic() < deadline:
            raise


def _apply(seen: Objects, event: Json) -> None:
    if event["type"] == "DELETED":
        seen.pop(_key(event["object"]), None)
    else:
        seen[_key(event["object"])] = event["object"]


def _key(item: Json) -> tuple[str, str]:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]
