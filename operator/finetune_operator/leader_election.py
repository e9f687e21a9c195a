"""One operator at work at a time: a Lease that it holds and renews, as client-go's leader election does.

So that a second one may wait beside the first: a node that is lost takes the operator's pod along, which nobody sees
end, and its Deployment starts another. Which Lease has expired is told by this process's own clock alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

import aiohttp
from kubernetes.aio.client import ApiException

from finetune_operator.api import Api, Json

DURATION_SECONDS, RENEW_SECONDS, LOOK_SECONDS = 15, 5.0, 2.0
_TROUBLES = (ApiException, aiohttp.ClientError, TimeoutError, OSError)
log = logging.getLogger(__name__)


class Leadership:
    """A hold on the Lease `name`.

    Args:
        identity: who this is; the same after a restart in place, which then need not wait.
    """

    def __init__(self, api: Api, namespace: str, name: str, identity: str) -> None:
        self._api, self._identity, self._name = api, identity, name
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._path = f"{self._collection}/{name}"
        self._namespace = namespace
        self._seen: tuple[str, float] = ("", 0.0)
        """What the Lease last said, and when it first said so."""

    async def acquire(self) -> None:
        """Come back once this is the one."""
        told = False
        while not await self._try():
            if not told:
                log.info("another operator holds Lease %s: waiting", self._name)
                told = True
            await asyncio.sleep(LOOK_SECONDS)

    async def keep(self, lost: Callable[[], None]) -> None:
        """Renew until cancelled; call `lost` once another has taken it.

        While the API server is away nobody can take it, and this one can do nothing that needs it.
        """
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            if await self._try() is False:
                log.error("Lease %s has gone to another operator", self._name)
                lost()
                return

    async def release(self) -> None:
        """Let the next one begin at once."""
        try:
            found = await self._api.get(self._path)
            if found is not None and found["spec"].get("holderIdentity") == self._identity:
                await self._write(found, "")
        except _TROUBLES as error:
            log.info("Lease %s is not released: %s", self._name, error)

    async def _try(self) -> bool | None:
        """Take it, or renew it; false where another holds it, None where the API server doesn't say."""
        try:
            found = await self._api.get(self._path)
            if found is None:
                metadata = {"name": self._name, "namespace": self._namespace}
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}
                await self._api.create(self._collection, body | {"spec": self._spec(self._identity)})
                return True
            if not self._free(found["spec"]):
                return False
            await self._write(found, self._identity)
            return True
        except _TROUBLES as error:
            log.info("Lease %s: %s: %s", self._name, type(error).__name__, str(error)[:200])
            return None

    def _free(self, spec: Json) -> bool:
        """Whether nobody else holds it."""
        holder, said = spec.get("holderIdentity"), f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if said != self._seen[0]:
            self._seen = (said, time.monotonic())
        lasts = spec.get("leaseDurationSeconds") or DURATION_SECONDS
        return not holder or holder == self._identity or time.monotonic() - self._seen[1] > lasts

    async def _write(self, found: Json, holder: str) -> None:
        """Only if it still is as it was found."""
        metadata = {"resourceVersion": found["metadata"]["resourceVersion"]}
        await self._api.merge(self._path, {"metadata": metadata, "spec": self._spec(holder)})

    def _spec(self, holder: str) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"holderIdentity": holder, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": now}
