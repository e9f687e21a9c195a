"""Leader election by a Lease: at most one operator acts at a time.

The protocol is that of client-go's leaderelection. A candidate takes the Lease once its holder has not renewed it for
the lease duration, measured by the candidate's own clock. The leader stops acting when it has not renewed the Lease
for the renew deadline, which is shorter, so it stops before another operator can take over.

`kubernetes.aio.leaderelection` (37.0) is not used, for three reasons. Its Lease calls let connection errors through:
`run` then raises and leaves the leader's task running. It checks the renew deadline only between calls, and a call to
an API server that does not answer lasts up to 5 minutes. It does not release the Lease on shutdown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import aiohttp
from kubernetes.aio.client import ApiException

from finetune_operator.api import Api, Json
from finetune_operator.core.settings import Settings

_CALL_ERRORS = (ApiException, aiohttp.ClientError, TimeoutError, OSError)
log = logging.getLogger(__name__)


class LeaderElector:
    """Acquires, renews and releases the Lease `settings.lease` in the operator's namespace.

    Args:
        identity: Holder identity. An operator that restarts with the same identity gets its Lease back at once.
    """

    def __init__(self, api: Api, settings: Settings, identity: str) -> None:
        self._api, self._identity, self._settings = api, identity, settings
        self._name, self._namespace = settings.lease, settings.operator_namespace
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{self._namespace}/leases"
        self._path = f"{self._collection}/{self._name}"
        self._observed: tuple[str, float] = ("", 0.0)
        """The Lease's last holder and renew time, and the monotonic time at which this process first read them."""
        self._renewed = 0.0
        """Monotonic time just before the last successful renewal was sent."""
        self._renewal: asyncio.Task[None] | None = None

    async def acquire(self) -> None:
        """Wait until this operator holds the Lease; from then on renew it in the background."""
        waiting = False
        while not await self._try_acquire_or_renew():
            if not waiting:
                log.info("another operator holds Lease %s: waiting", self._name)
                waiting = True
            await asyncio.sleep(self._settings.lease_retry_seconds)
        log.info("acquired Lease %s as %s", self._name, self._identity)
        self._renewal = asyncio.create_task(self._renew_until_lost(), name="lease")

    async def wait_until_lost(self) -> None:
        """Return when another operator holds the Lease, or when the renew deadline has passed since the last renewal.

        Call it after `acquire`.
        """
        assert self._renewal is not None
        await asyncio.shield(self._renewal)  # the waiting task may be cancelled while the Lease is still held

    async def release(self) -> None:
        """Stop renewing, and give a Lease that is not lost up: the next operator then acquires it at once."""
        if self._renewal is None or self._renewal.done():
            return
        self._renewal.cancel()
        try:
            lease = await self._api.get(self._path)
            if lease is not None and lease["spec"].get("holderIdentity") == self._identity:
                await self._write(lease, "")
        except _CALL_ERRORS as error:
            log.info("Lease %s is not released: %s", self._name, error)

    async def _renew_until_lost(self) -> None:
        while await self._renew():
            await asyncio.sleep(self._settings.lease_retry_seconds)

    async def _renew(self) -> bool:
        """Retry until the renew deadline; return whether the Lease is renewed."""
        seconds = self._settings.lease_renew_deadline_seconds
        try:
            async with asyncio.timeout(self._renewed + seconds - time.monotonic()):
                while (renewed := await self._try_acquire_or_renew()) is None:
                    await asyncio.sleep(self._settings.lease_retry_seconds)
        except TimeoutError:
            log.error("Lease %s was not renewed for %g s", self._name, seconds)
            return False
        if not renewed:
            log.error("another operator has taken Lease %s", self._name)
        return renewed

    async def _try_acquire_or_renew(self) -> bool | None:
        """Return whether this operator holds the Lease now, or None when the API server did not say."""
        started = time.monotonic()
        try:
            lease = await self._api.get(self._path)
            if lease is None:
                await self._create()
            elif not self._is_free(lease["spec"]):
                return False
            else:
                await self._write(lease, self._identity)
        except _CALL_ERRORS as error:
            log.info("Lease %s: %s: %s", self._name, type(error).__name__, str(error)[:200])
            return None
        self._renewed = started
        return True

    def _is_free(self, spec: Json) -> bool:
        """Whether this operator may write the Lease: it is the holder, there is none, or the Lease has expired."""
        holder, state = spec.get("holderIdentity"), f"{spec.get('holderIdentity')} {spec.get('renewTime')}"
        if state != self._observed[0]:
            self._observed = (state, time.monotonic())
        duration = spec.get("leaseDurationSeconds") or self._settings.lease_duration_seconds
        return not holder or holder == self._identity or time.monotonic() - self._observed[1] > duration

    async def _create(self) -> None:
        metadata = {"name": self._name, "namespace": self._namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}
        await self._api.create(self._collection, body | {"spec": self._spec({}, self._identity)})

    async def _write(self, lease: Json, holder: str) -> None:
        """Write the Lease unless it has changed since it was read."""
        metadata = {"resourceVersion": lease["metadata"]["resourceVersion"]}
        await self._api.merge(self._path, {"metadata": metadata, "spec": self._spec(lease["spec"], holder)})

    def _spec(self, before: Json, holder: str) -> Json:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec: Json = {
            "holderIdentity": holder,
            "leaseDurationSeconds": self._settings.lease_duration_seconds,
            "renewTime": now,
        }
        if holder and holder != before.get("holderIdentity"):
            spec |= {"acquireTime": now, "leaseTransitions": (before.get("leaseTransitions") or 0) + 1}
        return spec
