"""The controller: reconciles one job at a time from its snapshot. It observes, decides, plans and applies.

It is level-triggered: a decision depends on the current state only, and not on the event that caused it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from kubernetes.aio.client import ApiException

from finetune_operator.api import Api
from finetune_operator.apply import Outdated, Refused, apply
from finetune_operator.core.names import FINALIZER
from finetune_operator.core.report_validation import clean
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, Trouble
from finetune_operator.decide.actions import Decision, Event, StopRun
from finetune_operator.decide.classify import MESSAGE_LIMIT
from finetune_operator.decide.decide import decide
from finetune_operator.engines import Engine
from finetune_operator.engines.registry import (
    allowed_engines,
    engine_for,
    facts,
    observe_pod,
    observe_run,
    requested_engine,
)
from finetune_operator.log_lines import attempt_lines
from finetune_operator.metrics import Metrics
from finetune_operator.observe.cache import Cache, Key
from finetune_operator.observe.cache_staleness import untold_ends, untold_runs
from finetune_operator.observe.engine_discovery import is_served
from finetune_operator.observe.poller import Poller
from finetune_operator.observe.warning_events import Complaints
from finetune_operator.plan import (
    Annotate,
    Create,
    Delete,
    Json,
    Operation,
    SetFinalizers,
    event,
    job_path,
    owned_by,
    patch_status,
    plan,
    pods_query,
    run_path,
)
from finetune_operator.queue import WorkQueue
from finetune_operator.render.run import Run

REQUEUE_SECONDS = 0.5
log = logging.getLogger(__name__)


class Controller:
    """Reconciles the jobs of its queue.

    Args:
        engines: the engines that the cluster serves and that the settings allow. The operator watches their objects.
        restart: ends the process, so that it starts again. It is called when the cluster begins to serve an engine,
            because watches start with the process.
    """

    def __init__(
        self,
        api: Api,
        cache: Cache,
        settings: Settings,
        metrics: Metrics,
        *,
        engines: Collection[Engine],
        restart: Callable[[], None],
    ) -> None:
        self._api, self._cache, self._settings, self._metrics = api, cache, settings, metrics
        self._engines, self._restart = {engine.name for engine in engines}, restart
        self.queue = WorkQueue(self._reconcile)
        self._complaints = Complaints(api, self.queue.add_after)
        self.poller = Poller(cache, settings, self.queue.add)
        self._written: dict[Key, float] = {}
        self._annotated: dict[Key, float] = {}
        self._next_write = 0.0

    def job_gone(self, key: Key) -> None:
        """Forget a job that was deleted."""
        self._cache.forget(key)
        self.queue.forget(key)
        self._written.pop(key, None)
        self._annotated.pop(key, None)
        self._complaints.forget(key)
        self._metrics.forget(key)

    async def _reconcile(self, key: Key) -> None:
        seen = self._cache.observed(key)
        if seen is None or _is_leaving(seen.body["metadata"]):
            return
        with self._metrics.reconciling():
            await self._refresh(key, seen)
            await self._decide_and_apply(key)

    async def _decide_and_apply(self, key: Key) -> None:
        seen = await self._observed(key)
        if seen is None:
            return
        now = datetime.now(UTC)
        decision = decide(seen, self._settings, now)
        try:
            await self._apply(key, seen, decision, now)
        except Refused as refused:
            again = now + timedelta(seconds=self._settings.backoff_seconds)
            self._cache.troubles[key] = Trouble(refused.reason, clean(refused.message)[:MESSAGE_LIMIT], again)
            self.queue.add(key)
        except Outdated as outdated:
            log.info("%s/%s: %s", *key, outdated)
            await self._read_again(key)

    async def _read_again(self, key: Key) -> None:
        """Read the job from the API server: the watch may be late, and a watch that reconnects may miss a deletion."""
        body = await self._api.get(job_path({"namespace": key[0], "name": key[1]}))
        if body is None:
            self.job_gone(key)
        else:
            self._cache.put_job(body)
            self.queue.add_after(key, REQUEUE_SECONDS)

    async def _apply(self, key: Key, seen: Observed, decision: Decision, now: datetime) -> None:
        """Create, then write the status, then delete.

        Wherever this is interrupted, the next reconciliation comes to the same result.
        """
        # The status that is written below may have the plan of a preflight that has just ended.
        operations = plan(seen.body | {"status": decision.status}, decision.actions, self._settings)
        seen = await self._create(key, seen, operations)
        for action in decision.actions:
            if isinstance(action, StopRun):
                await self.poller.stop(key, action.run)
        await self._post_events(seen, decision.events, now)
        if releases := [item for item in operations if isinstance(item, SetFinalizers) and not item.holds]:
            await apply(self._api, releases)
            return  # the watch reports the deletion, perhaps before this answer
        await self._write_status(key, seen, decision)
        await self._annotate(key, [operation for operation in operations if isinstance(operation, Annotate)])
        await apply(self._api, [operation for operation in operations if isinstance(operation, Delete)])
        self._metrics.seen(key, seen.body, decision.status)
        if decision.wake is not None:
            self.queue.add_after(key, (decision.wake - datetime.now(UTC)).total_seconds() + 0.05)

    async def _create(self, key: Key, seen: Observed, operations: list[Operation]) -> Observed:
        """Create the objects and add the finalizer; return the snapshot with the job's version after that."""
        main: Json = {}
        for operation in operations:
            if isinstance(operation, SetFinalizers) and operation.holds:
                (answer,) = await apply(self._api, [operation])
                self._cache.put_job(answer)
                seen = replace(seen, body=answer)  # the status is written to this version of the job
            if isinstance(operation, Create):
                create = owned_by(operation, main) if operation.with_run else operation
                (answer,) = await apply(self._api, [create])
                self._cache_answer(answer)
                main = answer if operation.run else main
        if any(isinstance(operation, Create) for operation in operations):
            self._cache.troubles.pop(key, None)
        return seen

    async def _post_events(self, seen: Observed, events: tuple[Event, ...], now: datetime) -> None:
        for item in events:
            try:
                await apply(self._api, [event(seen.body, item, now)])
            except (Refused, ApiException) as error:  # the conditions have the same information
                log.warning("event %s was not created: %s", item.reason, error)

    async def _annotate(self, key: Key, operations: list[Annotate]) -> None:
        """Write annotations, at most as often as progress. The API server's refusal is logged and is no error."""
        if not operations:
            return
        wait = self._annotated.get(key, -1e9) + self._settings.status_seconds - time.monotonic()
        if wait > 0:
            self.queue.add_after(key, wait)
            return
        self._annotated[key] = time.monotonic()
        for operation in operations:
            try:
                (answer,) = await apply(self._api, [operation])
            except ApiException as error:
                log.warning("%s was not annotated: %s", operation.path, error.reason)
                continue
            self._cache_answer(answer)

    async def _write_status(self, key: Key, seen: Observed, decision: Decision) -> None:
        """Write the status if it has changed: at once, or with a pause where only progress has changed."""
        operation = patch_status(seen.body, decision.status)
        if not operation.status:
            return
        wait = 0.0 if decision.urgent else self._write_delay(key)
        if wait > 0:
            self.queue.add_after(key, wait)
            return
        (body,) = await apply(self._api, [operation])
        self._written[key] = time.monotonic()
        self._cache.put_job(body)
        for line in attempt_lines(seen.body.get("status") or {}, decision.status):
            log.info("%s/%s: %s", *key, line)
        if decision.urgent:
            self.queue.add(key)  # the new status may need another action, such as a check of the deadline

    def _write_delay(self, key: Key) -> float:
        """Return the seconds until progress may be written again, by the limits for this job and for all jobs."""
        now = time.monotonic()
        due = max(self._written.get(key, -1e9) + self._settings.status_seconds, self._next_write)
        if due <= now:
            self._next_write = max(now, self._next_write) + 1 / self._settings.status_writes_per_second
        return due - now

    async def _observed(self, key: Key) -> Observed | None:
        seen = self._cache.observed(key)
        if seen is None:
            return None
        spec = seen.body["spec"]
        await self._look_for(requested_engine(spec, self._settings))
        engines = facts(spec, self._settings, self._engines)
        complaints = await self._complaints.about(key, seen, datetime.now(UTC))
        return replace(seen, engines=engines, complaints=complaints)

    async def _look_for(self, engine: Engine) -> None:
        """Restart the operator if the cluster serves an engine that it did not serve when the operator started."""
        if engine.name in self._engines or engine not in allowed_engines(self._settings):
            return
        if await is_served(self._api, engine):
            log.warning("the cluster now serves %s: restarting to watch these objects", engine.kind)
            self._restart()

    async def _refresh(self, key: Key, seen: Observed) -> None:
        """Read what one watch implies and another watch has not reported yet."""
        for number in untold_runs(seen):
            run = Run(seen.body, number, self._settings)
            found = await self._api.get(run_path(run, engine_for(run).name))
            self._cache_answer(found or {})
        for ended in untold_ends(seen):
            async for body in self._api.items(*pods_query(*key, ended.run)):
                self._cache_pod(key[0], body)

    def _cache_answer(self, body: Json) -> None:
        """Put an object of a run that the API server returned into the cache before its watch reports it."""
        run = observe_run(body)
        if run is not None:
            self._cache.put_run(body["metadata"]["namespace"], run)
        if body.get("kind") == "Pod":
            self._cache_pod(body["metadata"]["namespace"], body)

    def _cache_pod(self, namespace: str, body: Json) -> None:
        pod = observe_pod(body)
        if pod is not None:
            self._cache.put_pod(namespace, pod)


def _is_leaving(metadata: Json) -> bool:
    """Whether the job is being deleted without this operator's finalizer: nothing is left to do."""
    return "deletionTimestamp" in metadata and FINALIZER not in (metadata.get("finalizers") or [])
