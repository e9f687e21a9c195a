"""Warning events of Kubernetes about a run that does not start, and Kueue's conditions of a run in a queue.

Only events say that a pod cannot be created (a quota, Pod Security) or that a volume cannot be mounted. They are read
only when the pods do not explain why a run does not start, and rarely: a job without problems costs no call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.aio.client import ApiException

from finetune_operator.api import Api
from finetune_operator.core.conditions import moment
from finetune_operator.core.snapshot import Complaint, Observed, RunState, RunView
from finetune_operator.decide.classify import waiting
from finetune_operator.engines import ENGINES
from finetune_operator.observe.cache import Key

Json = dict[str, Any]
FIRST_SECONDS = 15.0
"""Age of a run that has not started at which its events are first read."""
PAUSE_SECONDS = 60.0
"""Time until the events of the same run are read again."""
EVERY_SECONDS = 2.0
"""Time between two reads of events, all jobs together. For each read the API server scans all events of a namespace,
and it is already slow when thousands of runs wait for their pods."""
QUEUE_FIRST_SECONDS, QUEUE_SECONDS = 2.0, 15.0
"""The same two times for Kueue's Workload, which Kueue creates shortly after a run's object."""
QUEUE_VERSIONS = ("v1beta2", "v1beta1")
"""Versions of Kueue's API, newest first."""
_WAITING_CONDITIONS = {"Evicted": "True", "QuotaReserved": "False", "Requeued": "False"}
"""Conditions of a Workload that explain why it waits, with the status in which they do."""
MAX_EVENTS = 50
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Answer:
    subject: str
    read: datetime
    warnings: tuple[Complaint, ...]


class Complaints:
    """Reads and caches the warnings about each job; `again(key, seconds)` queues a job for a later reconcile."""

    def __init__(self, api: Api, again: Callable[[Key, float], None]) -> None:
        self._api, self._again = api, again
        self._answers: dict[Key, _Answer] = {}
        self._turns: dict[Key, datetime] = {}
        self._next_turn = datetime.min.replace(tzinfo=UTC)

    def forget(self, key: Key) -> None:
        self._answers.pop(key, None)
        self._turns.pop(key, None)

    async def about(self, key: Key, seen: Observed, now: datetime) -> tuple[Complaint, ...]:
        """Return the warnings about the job's run that has not started, newest first; none if its pods explain it."""
        run = _not_started(seen)
        subject = _subject(seen, run) if run is not None else None
        if run is None or subject is None:
            self.forget(key)
            return ()
        held = run.state is RunState.QUEUED
        pause = QUEUE_SECONDS if held else PAUSE_SECONDS
        young = (QUEUE_FIRST_SECONDS if held else FIRST_SECONDS) - (now - run.created).total_seconds()
        if young > 0:
            self._again(key, young)
            return ()
        known = self._answers.get(key)
        if known is not None and known.subject == subject and now - known.read < timedelta(seconds=pause):
            self._again(key, pause - (now - known.read).total_seconds())
        elif self._has_turn(key, now):
            warnings = await (self._read_queue(key[0], run) if held else self._read_events(key[0], subject, run))
            known = _Answer(subject, now, warnings)
            self._answers[key] = known
            self._again(key, pause)
        return known.warnings if known is not None and known.subject == subject else ()

    def _has_turn(self, key: Key, now: datetime) -> bool:
        """Whether the job's events may be read now; if not, queue the job for the time at which they may."""
        turn = self._turns.get(key)
        if turn is None and (self._next_turn - now).total_seconds() > PAUSE_SECONDS:
            self._again(key, PAUSE_SECONDS)
            return False
        if turn is None:
            turn = self._turns[key] = max(now, self._next_turn)
            self._next_turn = turn + timedelta(seconds=EVERY_SECONDS)
        if turn > now:
            self._again(key, (turn - now).total_seconds())
            return False
        del self._turns[key]
        return True

    async def _read_events(self, namespace: str, subject: str, run: RunView) -> tuple[Complaint, ...]:
        query = f"fieldSelector=type%3DWarning%2CinvolvedObject.name%3D{subject}&limit={MAX_EVENTS}"
        try:
            page = await self._api.get(f"/api/v1/namespaces/{namespace}/events?{query}") or {}
        except ApiException as error:  # without the right to read events the job runs, with less detail
            log.warning("events of %s/%s: %s", namespace, subject, error.reason)
            return ()
        return complaints_of(page.get("items") or [], run.created, ENGINES[run.engine].create_failures)

    async def _read_queue(self, namespace: str, run: RunView) -> tuple[Complaint, ...]:
        query = f"namespaces/{namespace}/workloads?labelSelector=kueue.x-k8s.io%2Fjob-uid%3D{run.uid}"
        try:
            for version in QUEUE_VERSIONS:
                page = await self._api.get(f"/apis/kueue.x-k8s.io/{version}/{query}")
                if page is not None:
                    return tuple(filter(None, map(queue_warning, page.get("items") or [])))
        except ApiException as error:  # without the right to read Workloads the job waits, with less detail
            log.warning("workloads of %s/%s: %s", namespace, run.name, error.reason)
        return ()


def queue_warning(workload: Json) -> Complaint | None:
    """Return why a Workload is not admitted, from Kueue's conditions: what preempted it, and what it waits for."""
    found = (workload.get("status") or {}).get("conditions") or []
    waiting = [item for item in found if item.get("status") == _WAITING_CONDITIONS.get(item.get("type"))]
    messages = [f"{item['reason']}: {item.get('message', '')}".removesuffix(": ") for item in waiting]
    return Complaint("Queued", "; ".join(dict.fromkeys(messages))) if messages else None


def complaints_of(events: list[Json], since: datetime, create_failures: tuple[str, ...] = ()) -> tuple[Complaint, ...]:
    """Return the events since `since`, newest first: an older object may have had the same name.

    Args:
        events: the events of one object.
        since: when the object was created.
        create_failures: reasons of events that say that pods cannot be created.
    """
    ordered = sorted(((_time(item), item) for item in events), key=lambda pair: pair[0], reverse=True)
    recent = (item for time, item in ordered if time >= since.replace(microsecond=0))
    said = ((item.get("reason") or "", item.get("message") or "") for item in recent)
    return tuple(Complaint(reason, message, reason in create_failures) for reason, message in said)


def _time(event: Json) -> datetime:
    series = event.get("series") or {}
    found = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return moment(found or event["metadata"]["creationTimestamp"])


def _not_started(seen: Observed) -> RunView | None:
    """Return the newest run of the job that is pending or that a queue holds."""
    waits = (RunState.PENDING, RunState.QUEUED)
    runs = [run for run in seen.runs if run.owner == seen.uid and run.state in waits and not run.deleting]
    return max(runs, key=lambda run: run.run, default=None)


def _subject(seen: Observed, run: RunView) -> str | None:
    """Return the name of the object whose events explain a run: the pods' owner if there are none, else a pending pod.

    For a run that a queue holds, return the run's uid, which Kueue's Workload has as a label.
    """
    if run.state is RunState.QUEUED:
        return run.uid
    pods = [pod for pod in seen.pods_of(run.run) if not pod.gone and pod.grace_over is None]
    if not pods:
        return run.pods_maker or run.name
    if waiting(pods) is not None:
        return None
    return next((pod.name for pod in pods if pod.node is not None and pod.phase == "Pending"), None)
