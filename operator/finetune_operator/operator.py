"""The kopf side: watches that fill the cache and wake the controller, probes, start and stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_operator import names
from finetune_operator.api import Api, configuration, connect
from finetune_operator.cache import Cache, Key
from finetune_operator.controller import Controller
from finetune_operator.engines import ENGINES, Engine
from finetune_operator.metrics import Metrics
from finetune_operator.observed import pod_view
from finetune_operator.settings import Settings
from finetune_operator.token_key import with_token_key

Json = dict[str, Any]
SERVER_TIMEOUT_SECONDS = 300
CLIENT_TIMEOUT_SECONDS = 330
log = logging.getLogger(__name__)


@dataclass
class Operator:
    """What the handlers share."""

    settings: Settings
    api: Api
    cache: Cache
    controller: Controller
    metrics: Metrics
    heard: float = field(default_factory=time.monotonic)
    """When a watch last told something."""

    def job_event(self, kind: str | None, body: Json) -> None:
        self.heard = time.monotonic()
        if kind == "DELETED":
            self.controller.job_gone(_key(body))
        else:
            self.controller.queue.add(self.cache.put_job(body))

    def run_event(self, engine: Engine, kind: str | None, body: Json) -> None:
        self.heard = time.monotonic()
        run = engine.observe(body)
        if run is None:
            return
        key: Key = (body["metadata"]["namespace"], run.job)
        if kind == "DELETED":
            self.cache.drop_run(key, run.name)
        else:
            self.cache.put_run(key[0], run)
        self.controller.queue.add(key)

    def pod_event(self, kind: str | None, body: Json) -> None:
        self.heard = time.monotonic()
        pod = pod_view(body)
        if pod is None:
            return
        key: Key = (body["metadata"]["namespace"], pod.job)
        if kind == "DELETED":
            self.cache.drop_pod(key, pod)
        else:
            self.cache.put_pod(key[0], pod)
        self.controller.queue.add(key)


    async def check_watch(self) -> None:
        """Long silence may be peace, or a dead watch: compare with what the API server has.

        Raises:
            RuntimeError: the watch has died.
        """
        for namespace in self.settings.namespaces or ("",):
            scope = f"/namespaces/{namespace}" if namespace else ""
            found = await self.api.get(f"/apis/{GROUP}/{VERSION}{scope}/{PLURAL}?resourceVersion=0")
            for body in (found or {}).get("items", []):
                if self.cache.is_news(body):
                    raise RuntimeError(f"the watch has not told of {'/'.join(_key(body))}")
        self.heard = time.monotonic()


def registry(operator: Operator, engines: list[Engine]) -> kopf.OperatorRegistry:
    """Kopf's handlers. Each kind has an index beside its event handler: kopf calls no handler before all indices are
    filled, so the first decision already sees every job, run and pod."""
    handlers, begin = kopf.OperatorRegistry(), operator.controller.queue.start
    _watch_kind(handlers, (GROUP, VERSION, PLURAL), operator.job_event, begin)
    _watch_kind(handlers, ("", "v1", "pods"), operator.pod_event, begin)
    for engine in engines:
        _watch_kind(handlers, (engine.group, engine.version, engine.plural), _of(operator, engine), begin)
    kopf.on.startup(registry=handlers, id="configure")(_configure)
    kopf.on.login(registry=handlers, id="login", retries=5)(_login)
    # Without that mode kopf would try a failed probe again, and say nothing meanwhile.
    kopf.on.probe(registry=handlers, id="silence", errors=kopf.ErrorsMode.PERMANENT)(_probe(operator))
    return handlers


def _of(operator: Operator, engine: Engine) -> Any:
    return lambda kind, body: operator.run_event(engine, kind, body)


def _watch_kind(
    handlers: kopf.OperatorRegistry, resource: tuple[str, str, str], hear: Any, begin: Callable[[], None]
) -> None:
    name = resource[2]

    async def fill(body: kopf.Body, **_: Any) -> None:
        hear(None, dict(body))

    async def on_event(event: Json, **_: Any) -> None:
        hear(event["type"], event["object"])
        begin()  # the first call says that all indices are filled

    kopf.index(*resource, registry=handlers, id=f"{name}-index")(fill)
    kopf.on.event(*resource, registry=handlers, id=name)(on_event)


async def _configure(settings: kopf.OperatorSettings, **_: Any) -> None:
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    for resource in ("pods", "jobs.batch", "rayjobs.ray.io"):
        settings.watching.label_selectors[resource] = names.MANAGED_SELECTOR


async def _login(**_: Any) -> kopf.ConnectionInfo:
    """The same identity as the controller's. Kopf logs in again when a token has run out."""
    config: Configuration = await configuration()
    header = await config.get_api_key_with_prefix("BearerToken") or ""
    return kopf.ConnectionInfo(
        server=config.host,
        ca_path=config.ssl_ca_cert,
        token=header.rpartition(" ")[2] or None,
        certificate_path=config.cert_file,
        private_key_path=config.key_file,
    )


def _probe(operator: Operator) -> Any:
    async def silence(**_: Any) -> float:
        """Seconds since a watch last told something, or since it was found to have missed nothing.

        Raises:
            RuntimeError: the watch of jobs has died: the API server has news that it did not tell.
        """
        if time.monotonic() - operator.heard > operator.settings.watch_silence_seconds:
            await operator.check_watch()
        return round(time.monotonic() - operator.heard, 1)

    return silence


async def run(settings: Settings) -> None:
    """The operator, until it is cancelled or told to end by a signal."""
    api = await connect()
    settings = await with_token_key(api, settings)
    kuberay = settings.kuberay and await api.has_kuberay()
    cache, metrics = Cache(), Metrics()
    over = asyncio.Event()
    controller = Controller(api, cache, settings, metrics, kuberay=kuberay, start_again=over.set)
    operator = Operator(settings, api, cache, controller, metrics)
    engines = [engine for engine in ENGINES.values() if engine.name != "kuberay" or kuberay]
    if settings.metrics_port:
        metrics.serve(settings.metrics_port)
    poller = asyncio.create_task(controller.poller.run(), name="poller")
    try:
        await kopf.operator(
            registry=registry(operator, engines),
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=list(settings.namespaces),
            stop_flag=over,
            liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz" if settings.health_port else None,
        )
    finally:
        poller.cancel()
        await asyncio.gather(poller, return_exceptions=True)
        await controller.queue.stop()
        await api.close()


def _key(body: Json) -> Key:
    return body["metadata"]["namespace"], body["metadata"]["name"]


__all__ = ["Operator", "run"]
