"""Start and stop of the operator: kopf's handlers and probe, the watches that fill the cache, leader election."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import kopf
from kubernetes.aio.client import Configuration

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_operator.api import PAGE, SILENCE_SECONDS, Api, configuration, connect, uses_proxy
from finetune_operator.controller import Controller
from finetune_operator.core import names
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodView, RunView
from finetune_operator.engines import Engine
from finetune_operator.engines.registry import observe_pod
from finetune_operator.leader_election import LeaderElector
from finetune_operator.metrics import Metrics
from finetune_operator.observe.cache import Cache, Key
from finetune_operator.observe.engine_discovery import available_engines
from finetune_operator.observe.reflector import Reflector
from finetune_operator.token_key import with_token_key

Json = dict[str, Any]
log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """This operator no longer holds its Lease and has stopped acting."""


@dataclass
class Operator:
    """State that the handlers share."""

    settings: Settings
    api: Api
    cache: Cache
    controller: Controller
    metrics: Metrics
    last_event: float = field(default_factory=time.monotonic)
    """Monotonic time of the last event of the FineTuneJob watch, or of the last check that it has missed nothing."""

    def job_event(self, kind: str | None, body: Json) -> None:
        """Update the cache and queue the job, unless the event only repeats this operator's own write."""
        self.last_event = time.monotonic()
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
        """List the jobs and compare them with the cache: a watch without events may be idle or dead.

        Raises:
            RuntimeError: The API server has a newer version of a job than the watch has delivered.
        """
        for namespace in self.settings.namespaces or ("",):
            scope = f"/namespaces/{namespace}" if namespace else ""
            async for body in self.api.items(f"/apis/{GROUP}/{VERSION}{scope}/{PLURAL}"):
                if self.cache.is_news(body):
                    raise RuntimeError(f"the watch has not delivered the newest version of {'/'.join(_key(body))}")
        self.last_event = time.monotonic()


def registry(operator: Operator) -> kopf.OperatorRegistry:
    """Return kopf's handlers: events of FineTuneJobs, start-up, login and the liveness probe."""
    handlers = kopf.OperatorRegistry()

    async def on_event(event: kopf.RawEvent, **_: Any) -> None:
        operator.job_event(event["type"], cast(Json, event["object"]))

    kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers, id=PLURAL)(on_event)
    kopf.on.startup(registry=handlers, id="configure")(_configure)
    kopf.on.login(registry=handlers, id="login", retries=5)(_login)
    # In the default mode kopf retries a failed probe later and reports it as healthy until then.
    kopf.on.probe(registry=handlers, id="silence", errors=kopf.ErrorsMode.PERMANENT)(_probe(operator))
    return handlers


def reflectors(operator: Operator, api: Api, engines: list[Engine]) -> list[Reflector[Any]]:
    """Return the watches of pods and of the engines' runs, one per kind and watched namespace."""
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
    """Start the work queue once all runs and pods are listed: no decision is made from an incomplete cache."""
    for watch in watches:
        await watch.listed.wait()
    operator.controller.queue.start()


async def _configure(settings: kopf.OperatorSettings, **_: Any) -> None:
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.inactivity_timeout = SILENCE_SECONDS  # bookmarks come once a minute: more silence is a dead watch
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = PAGE
    settings.queueing.idle_timeout = 0.5  # until then kopf keeps a task and the whole object for each job


async def _login(**_: Any) -> kopf.ConnectionInfo:
    """Return kopf's credentials, the same as the controller's. Kopf calls this again when a token has expired."""
    config: Configuration = await configuration()
    header = await config.get_api_key_with_prefix("BearerToken") or ""
    return kopf.ConnectionInfo(
        server=config.host,
        ca_path=config.ssl_ca_cert,
        token=header.rpartition(" ")[2] or None,
        certificate_path=config.cert_file,
        private_key_path=config.key_file,
        trust_env=uses_proxy(),
    )


def _probe(operator: Operator) -> Any:
    async def silence(**_: Any) -> float:
        """Return the seconds since the last event of the job watch, or since the last check of it.

        Kopf does not pass bookmarks to handlers, so a long time without events is no proof of a dead watch: then the
        cache is compared with a list.

        Raises:
            RuntimeError: The watch is dead.
        """
        if time.monotonic() - operator.last_event > operator.settings.watch_silence_seconds:
            await operator.check_watch()
        return round(time.monotonic() - operator.last_event, 1)

    return silence


async def run(settings: Settings) -> None:
    """Run the operator until it is cancelled, gets a signal or loses its Lease.

    Raises:
        LeaseLost: Another operator may take, or has taken, the Lease.
    """
    api = await connect()
    elector = await _elected(api, settings)
    try:
        await _run_elected(api, await with_token_key(api, settings), elector)
    finally:
        if elector is not None:
            await elector.release()
        await api.close()


async def _elected(api: Api, settings: Settings) -> LeaderElector | None:
    """Return once this operator holds the Lease; None if leader election is switched off."""
    if not settings.operator_namespace or not settings.lease:
        return None
    elector = LeaderElector(api, settings, settings.identity or socket.gethostname())
    await elector.acquire()
    return elector


async def _run_elected(api: Api, settings: Settings, elector: LeaderElector | None) -> None:
    over = asyncio.Event()
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
    guards = [asyncio.create_task(_stop_when_lost(elector, controller, tasks), name="leader")] if elector else []
    for task in (*tasks, *guards):
        task.add_done_callback(lambda ended: _end_with(ended, over))
    try:
        await _run_kopf(operator, over)
    finally:
        errors = [*await _stop_acting(controller, tasks), *await _cancelled(guards)]
        await watching.close()
    for error in errors:
        raise error


async def _run_kopf(operator: Operator, over: asyncio.Event) -> None:
    settings = operator.settings
    await kopf.operator(
        registry=registry(operator),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=list(settings.namespaces),
        stop_flag=over,
        liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz" if settings.health_port else None,
    )


async def _stop_when_lost(elector: LeaderElector, controller: Controller, tasks: list[asyncio.Task[None]]) -> None:
    """Stop all writes at once when the Lease is lost; kopf, which only reads, is stopped after that.

    Raises:
        LeaseLost: Always, once the writes have stopped.
    """
    await elector.wait_until_lost()
    await _stop_acting(controller, tasks)
    log.error("stopped acting")
    raise LeaseLost("the Lease is lost")


async def _stop_acting(controller: Controller, tasks: list[asyncio.Task[None]]) -> list[Exception]:
    """Cancel the tasks first, of which `begin` starts the work queue, and then the work queue."""
    errors = await _cancelled(tasks)
    await controller.queue.stop()
    return errors


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> list[Exception]:
    """Cancel tasks and return the exceptions of those that have failed."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    return [end for end in ends if isinstance(end, Exception)]


def _end_with(task: asyncio.Task[None], over: asyncio.Event) -> None:
    """Stop the operator when one of its tasks has failed: without it the cache would be out of date."""
    if not task.cancelled() and task.exception() is not None:
        log.error("%s ended: %r", task.get_name(), task.exception())
        over.set()


def _key(body: Json) -> Key:
    return body["metadata"]["namespace"], body["metadata"]["name"]


__all__ = ["LeaseLost", "Operator", "run"]
