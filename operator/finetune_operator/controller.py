"""One look at one job: observe, decide, apply. Level-triggered: whatever woke it, the answer is from what is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from kubernetes.aio.client import ApiException

from finetune_operator.api import Api
from finetune_operator.apply import Outdated, Refused, apply
from finetune_operator.core.names import FINALIZER
from finetune_operator.core.report_validation import clean
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, Trouble, pod_view
from finetune_operator.decide.actions import Decision, StopRun
from finetune_operator.decide.classify import MESSAGE_LIMIT
from finetune_operator.decide.decide import decide
from finetune_operator.engines import ENGINES, engine_of
from finetune_operator.log_lines import attempt_lines
from finetune_operator.metrics import Metrics
from finetune_operator.observe.cache import Cache, Key
from finetune_operator.observe.cache_staleness import untold_ends, untold_runs
from finetune_operator.observe.poller import Poller
from finetune_operator.observe.warning_events import Complaints
from finetune_operator.plan import (
    Annotate,
    Create,
    Delete,
    Json,
    SetFinalizers,
    engine_for,
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

AGAIN_SECONDS = 0.5
log = logging.getLogger(__name__)


class Controller:
    """Works off the queue of jobs.

    Args:
        kuberay: whether the cluster has RayJobs, and this operator may use them.
        start_again: is called when it has them now and hadn't before: their watch begins with the process.
    """

    def __init__(
        self,
        api: Api,
        cache: Cache,
        settings: Settings,
        metrics: Metrics,
        *,
        kuberay: bool,
        start_again: Callable[[], None],
    ) -> None:
        self._api, self._cache, self._settings, self._metrics = api, cache, settings, metrics
        self._kuberay, self._start_again = kuberay, start_again
        self.queue = WorkQueue(self._look)
        self._complaints = Complaints(api, self.queue.add_after)
        self.poller = Poller(cache, settings, self.queue.add)
        self._written: dict[Key, float] = {}
        self._annotated: dict[Key, float] = {}
        self._next_write = 0.0

    def job_gone(self, key: Key) -> None:
        self._cache.forget(key)
        self.queue.forget(key)
        self._written.pop(key, None)
        self._annotated.pop(key, None)
        self._complaints.forget(key)
        self._metrics.forget(key)

    async def _look(self, key: Key) -> None:
        seen = self._cache.observed(key)
        if seen is None or _is_leaving(seen.body["metadata"]):
            return
        with self._metrics.reconciling():
            await self._catch_up(key, seen)
            await self._act(key)

    async def _act(self, key: Key) -> None:
        seen = await self._observed(key)
        if seen is None:
            return
        now = datetime.now(UTC)
        decision = decide(seen, self._settings, now)
        try:
            await self._carry_out(key, seen, decision, now)
        except Refused as refused:
            again = now + timedelta(seconds=self._settings.backoff_seconds)
            self._cache.troubles[key] = Trouble(refused.reason, clean(refused.message)[:MESSAGE_LIMIT], again)
            self.queue.add(key)
        except Outdated as outdated:
            log.info("%s/%s: %s", *key, outdated)
            await self._read_again(key)

    async def _read_again(self, key: Key) -> None:
        """The job as the API server has it now: a watch may not have told yet, or may never tell, that it has gone."""
        body = await self._api.get(job_path({"namespace": key[0], "name": key[1]}))
        if body is None:
            self.job_gone(key)
        else:
            self._cache.put_job(body)
            self.queue.add_after(key, AGAIN_SECONDS)

    async def _carry_out(self, key: Key, seen: Observed, decision: Decision, now: datetime) -> None:
        """Make, then tell, then delete: at whatever point this ends, a second look comes to the same."""
        # With the status that is about to be written: it may hold the plan that a preflight has just told.
        operations = plan(seen.body | {"status": decision.status}, decision.actions, self._settings)
        main: Json = {}
        for operation in operations:
            if isinstance(operation, SetFinalizers) and operation.holds:
                (answer,) = await apply(self._api, [operation])
                self._cache.put_job(answer)
                seen = replace(seen, body=answer)  # the status is written to this version of the job
            if isinstance(operation, Create):
                wanted = owned_by(operation, main) if operation.with_run else operation
                (answer,) = await apply(self._api, [wanted])
                self._remember(answer)
                main = answer if operation.run else main
        if any(isinstance(operation, Create) for operation in operations):
            self._cache.troubles.pop(key, None)
        for action in decision.actions:
            if isinstance(action, StopRun):
                await self.poller.stop(key, action.run)
        await self._tell(seen, decision, now)
        if letting_go := [item for item in operations if isinstance(item, SetFinalizers) and not item.holds]:
            await apply(self._api, letting_go)
            return  # its watch tells when it has gone, which may be before this answer
        await self._write(key, seen, decision)
        await self._annotate(key, [operation for operation in operations if isinstance(operation, Annotate)])
        await apply(self._api, [operation for operation in operations if isinstance(operation, Delete)])
        self._metrics.seen(key, seen.body, decision.status)
        if decision.wake is not None:
            self.queue.add_after(key, (decision.wake - datetime.now(UTC)).total_seconds() + 0.05)

    async def _tell(self, seen: Observed, decision: Decision, now: datetime) -> None:
        for item in decision.events:
            try:
                await apply(self._api, [event(seen.body, item, now)])
            except (Refused, ApiException) as error:  # an event is a courtesy: the conditions say the same
                log.warning("event %s was not taken: %s", item.reason, error)

    async def _annotate(self, key: Key, operations: list[Annotate]) -> None:
        """Write annotations, as often as progress may be written. They are a courtesy: what is refused is logged."""
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
            self._remember(answer)
            if answer.get("kind") == "Pod" and (pod := pod_view(answer)) is not None:
                self._cache.put_pod(key[0], pod)

    async def _write(self, key: Key, seen: Observed, decision: Decision) -> None:
        """Write the status where it has changed: at once, or as often as mere progress may be written."""
        operation = patch_status(seen.body, decision.status)
        if not operation.status:
            return
        wait = 0.0 if decision.urgent else self._wait(key)
        if wait > 0:
            self.queue.add_after(key, wait)
            return
        (body,) = await apply(self._api, [operation])
        self._written[key] = time.monotonic()
        self._cache.put_job(body)
        for line in attempt_lines(seen.body.get("status") or {}, decision.status):
            log.info("%s/%s: %s", *key, line)
        if decision.urgent:
            self.queue.add(key)  # what was written may ask for more, such as a look at the deadline

    def _wait(self, key: Key) -> float:
        """Seconds until progress may be written again, for this job and for all together."""
        now = time.monotonic()
        due = max(self._written.get(key, -1e9) + self._settings.status_seconds, self._next_write)
        if due <= now:
            self._next_write = max(now, self._next_write) + 1 / self._settings.status_writes_per_second
        return due - now

    async def _observed(self, key: Key) -> Observed | None:
        seen = self._cache.observed(key)
        if seen is None:
            return None
        wanted = seen.body["spec"].get("kubernetes", {}).get("engine", "auto")
        missing = engine_of(wanted, self._settings).name == "kuberay" and not self._kuberay
        if missing and self._settings.kuberay and await self._api.has_kuberay():
            log.warning("KubeRay is there now: starting again to watch its RayJobs")
            self._start_again()
        said = await self._complaints.about(key, seen, datetime.now(UTC))
        return replace(seen, engine_missing=missing, complaints=said)

    async def _catch_up(self, key: Key, seen: Observed) -> None:
        """One watch may lag behind another: ask for what it has not told yet."""
        for number in untold_runs(seen):
            run = Run(seen.body, number, self._settings)
            found = await self._api.get(run_path(run, engine_for(run)))
            self._remember(found or {})
        for ended in untold_ends(seen):
            async for body in self._api.items(*pods_query(*key, ended.run)):
                pod = pod_view(body)
                if pod is not None:
                    self._cache.put_pod(key[0], pod)

    def _remember(self, body: Json) -> None:
        """An answer of the API server about a run, ahead of the watch."""
        for engine in ENGINES.values():
            if body.get("kind") == {"jobs": "Job", "rayjobs": "RayJob"}[engine.plural]:
                run = engine.observe(body)
                if run is not None:
                    self._cache.put_run(body["metadata"]["namespace"], run)


def _is_leaving(metadata: Json) -> bool:
    """Deleted, and not held by this operator: nothing is left to do."""
    return "deletionTimestamp" in metadata and FINALIZER not in (metadata.get("finalizers") or [])
