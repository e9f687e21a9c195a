"""The kopf side: watches that fill the cache and wake the controller, probes, start and stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from dataclasses import dataclass, field
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_operator.api import PAGE, Api, configuration, connect
from finetune_operator.controller import Controller
from finetune_operator.core import names
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodView, RunView
from finetune_operator.engines import Engine
from finetune_operator.engines.registry import observe_pod
from finetune_operator.leader_election import Leadership
from finetune_operator.metrics import Metrics
from finetune_operator.observe.cache import Cache, Key
from finetune_operator.observe.engine_discovery import available_engines
from finetune_operator.observe.reflector import Reflector
from finetune_operator.token_key import with_token_key

Json = dict[str, Any]
SERVER_TIMEOUT_SECONDS = 60
CLIENT_TIMEOUT_SECONDS = 75
"""A connection that has died without a word is given up after that: kopf asks for no bookmarks to tell."""
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
    """When the watch of jobs last told something."""

    def job_event(self, kind: str | None, body: Json) -> None:
        """Look at a job that has changed; what this operator wrote itself is no news."""
        self.heard = time.monotonic()
        if kind == "DELETED":
            self.controller.job_gone(_key(body))
        elif self.cache.is_news(body):
            self.controller.queue.add(self.cache.put_job(body))

    def put_run(self, namespace: str, run: RunView) -> None:
        self.controller.queue.add(self.cache.put_run(namespace, run))

    def drop_run(self, namespace: str, run: RunView) -> None:
        self.cache.drop_run((namespace, run.job), run.name)
        self.controller.queue.add((namespace, run.job))

    def put_pod(self, namespace: str, pod: PodView) -> None:
        self.controller.queue.add(self.cache.put_pod(namespace, pod))

    def drop_pod(self, namespace: str, pod: PodView) -> None:
        self.cache.drop_pod((namespace, pod.job), pod)
        self.controller.queue.add((namespace, pod.job))

    async def check_watch(self) -> None:
        """Long silence may be peace, or a dead watch: compare with what the API server has.

        Raises:
            RuntimeError: the watch has died.
        """
        for namespace in self.settings.namespaces or ("",):
            scope = f"/namespaces/{namespace}" if namespace else ""
            async for body in self.api.items(f"/apis/{GROUP}/{VERSION}{scope}/{PLURAL}"):
                if self.cache.is_news(body):
                    raise RuntimeError(f"the watch has not told of {'/'.join(_key(body))}")
        self.heard = time.monotonic()


def registry(operator: Operator) -> kopf.OperatorRegistry:
    """Kopf's handlers."""
    handlers = kopf.OperatorRegistry()

    async def on_event(event: Json, **_: Any) -> None:
        operator.job_event(event["type"], event["object"])

    kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers, id=PLURAL)(on_event)
    kopf.on.startup(registry=handlers, id="configure")(_configure)
    kopf.on.login(registry=handlers, id="login", retries=5)(_login)
    # Without that mode kopf would try a failed probe again, and say nothing meanwhile.
    kopf.on.probe(registry=handlers, id="silence", errors=kopf.ErrorsMode.PERMANENT)(_probe(operator))
    return handlers


def reflectors(operator: Operator, api: Api, engines: list[Engine]) -> list[Reflector[Any]]:
    """The watches of runs and pods, in every namespace that is watched."""
    made: list[Reflector[Any]] = []
    for namespace in operator.settings.namespaces or ("",):
        scope = f"/namespaces/{namespace}" if namespace else ""
        pods = f"/api/v1{scope}/pods"
        made.append(Reflector(api, pods, names.MANAGED_SELECTOR, observe_pod, operator.put_pod, operator.drop_pod))
        for engine in engines:
            runs = engine.collection(namespace)
            made.append(
                Reflector(api, runs, names.MANAGED_SELECTOR, engine.observe, operator.put_run, operator.drop_run)
            )
    return made


async def begin(operator: Operator, watches: list[Reflector[Any]]) -> None:
    """Decide nothing before all runs and pods are known."""
    for watch in watches:
        await watch.listed.wait()
    operator.controller.queue.start()


async def _configure(settings: kopf.OperatorSettings, **_: Any) -> None:
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = PAGE
    settings.queueing.idle_timeout = 0.5  # until then kopf keeps a task, and the whole object, of each job


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
    over = asyncio.Event()
    leadership = None
    if settings.operator_namespace and settings.lease:
        identity = settings.identity or socket.gethostname()
        leadership = Leadership(api, settings.operator_namespace, settings.lease, identity)
        await leadership.acquire()
    settings = await with_token_key(api, settings)
    engines = await available_engines(api, settings)
    cache, metrics = Cache(), Metrics()
    controller = Controller(api, cache, settings, metrics, engines=engines, restart=over.set)
    operator = Operator(settings, api, cache, controller, metrics)
    if settings.metrics_port:
        metrics.serve(settings.metrics_port)
    watching = await connect(connections=0)
    watches = reflectors(operator, watching, engines)
    tasks = [
        asyncio.create_task(controller.poller.run(), name="poller"),
        asyncio.create_task(begin(operator, watches), name="begin"),
        *(asyncio.create_task(watch.run(), name="watch") for watch in watches),
    ]
    if leadership is not None:
        tasks.append(asyncio.create_task(leadership.keep(over.set), name="lease"))
    for task in tasks:
        task.add_done_callback(lambda ended: _end_with(ended, over))
    try:
        await kopf.operator(
            registry=registry(operator),
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=list(settings.namespaces),
            stop_flag=over,
            liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz" if settings.health_port else None,
        )
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        await controller.queue.stop()
        await watching.close()
        if leadership is not None:
            await leadership.release()
        await api.close()
    for end in ends:
        if isinstance(end, Exception):
            raise end


def _end_with(task: asyncio.Task[None], over: asyncio.Event) -> None:
    """An operator that is blind on one eye is worse than one that starts again."""
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended: %r", task.get_name(), task.exception())
        over.set()


def _key(body: Json) -> Key:
    return body["metadata"]["namespace"], body["metadata"]["name"]


__all__ = ["Operator", "run"]
