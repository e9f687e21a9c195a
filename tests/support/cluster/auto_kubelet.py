"""A scheduler and kubelet for thousands of pods: each is bound, runs, and ends when it is deleted.

One watch drives it; `ends` may end a running pod. For single pods and for failures, see `kubelet_stand_in`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import ClientSession, ClientTimeout, TCPConnector
from support.cluster import pod_status
from support.cluster.access import Access

Json = dict[str, Any]
MERGE = {"Content-Type": "application/strategic-merge-patch+json"}
MAX_LINE = 16 * 1024 * 1024
PARALLEL = 50
SETTLED = (200, 201, 404, 409)
"""Status codes of a change that was made, whose pod is gone, or that was made before."""
START_SECONDS = 10
SIGTERM_EXIT = 143


def never(_: Json) -> int | None:
    """Return None, so that no pod ends by itself."""
    return None


class AutoKubelet:
    """A context manager that binds, runs and ends the pods of `selector` in every namespace."""

    def __init__(
        self, access: Access, node: str, *, selector: str = "", ends: Callable[[Json], int | None] = never
    ) -> None:
        """Set up for an existing `node`; `ends` returns the exit code of a running pod (JSON) that must end."""
        self._access, self._node, self._selector, self._ends = access, node, selector, ends
        self._running: set[str] = set()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> AutoKubelet:
        self._thread.start()
        assert self._ready.wait(START_SECONDS), "the kubelet did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()
        if self._error is not None:
            raise self._error

    def wait_running(self, count: int, timeout: float = 60) -> None:
        """Wait until `count` pods have run.

        Raises:
            AssertionError: fewer have within `timeout` seconds.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: len(self._running) >= count, timeout)
        assert done, f"{len(self._running)} pods ran within {timeout} s, not {count}"

    async def _serve(self) -> None:
        trusted = ssl.create_default_context(cafile=str(self._access.ca_file))
        headers = {"Authorization": f"Bearer {self._access.token}", "User-Agent": "auto-kubelet"}
        connector = TCPConnector(limit=PARALLEL, ssl=trusted)
        async with ClientSession(
            self._access.url, connector=connector, headers=headers, timeout=ClientTimeout(), read_bufsize=MAX_LINE
        ) as self._session:
            watching = asyncio.create_task(self._watch())
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._error = watching.exception() if watching.done() else None
            for task in (watching, stopping, *self._tasks):
                task.cancel()
            await asyncio.gather(watching, stopping, *self._tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Follow the pods without a resource version, so that existing pods come first."""
        query = {"watch": "1", "labelSelector": self._selector}
        while True:
            async with self._session.get("/api/v1/pods", params=query) as answer:
                answer.raise_for_status()
                self._ready.set()
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED"):
                        self._start(self._move(event["object"]))

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _move(self, pod: Json) -> None:
        """Make the next step of a pod; the change triggers the next event."""
        metadata, status = pod["metadata"], pod["status"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        phase = status.get("phase", "Pending")
        if metadata.get("deletionTimestamp"):
            if phase not in ("Succeeded", "Failed"):
                await self._patch(path, pod_status.finished(pod, SIGTERM_EXIT))
            else:
                await self._send("DELETE", path, {"gracePeriodSeconds": 0})
        elif not pod["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": self._node}
            await self._send("POST", f"{path}/binding", {"metadata": {"name": metadata["name"]}, "target": target})
        elif phase == "Pending":
            await self._patch(path, pod_status.running(pod, "127.0.0.1"))
        elif phase == "Running":
            self._ran(metadata["uid"])
            exit_code = self._ends(pod)
            if exit_code is not None:
                await self._patch(path, pod_status.finished(pod, exit_code))

    def _ran(self, uid: str) -> None:
        with self._changed:
            self._running.add(uid)
            self._changed.notify_all()

    async def _patch(self, path: str, status: Json) -> None:
        await self._send("PATCH", f"{path}/status", {"status": status}, MERGE)

    async def _send(self, method: str, path: str, body: Json, headers: Json | None = None) -> None:
        async with self._session.request(method, path, json=body, headers=headers) as answer:
            if answer.status not in SETTLED:
                self._error = AssertionError(f"{method} {path}: {answer.status} {await answer.text()}")
                self._stop.set()
