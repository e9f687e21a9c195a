"""Kubernetes' own warnings about a run that does not begin, and Kueue's words on one that a queue holds.

A pod that is not made (a quota, Pod Security), and a volume that can't be mounted, are told of in events alone. Events
are read where nothing else says what holds a run up, and seldom: a job that goes well costs no call.
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
"""Age of a run that has not begun before anybody asks why."""
PAUSE_SECONDS = 60.0
"""Until the same is asked again."""
EVERY_SECONDS = 2.0
"""Between two questions, all jobs together: an API server looks through all events of a namespace for each, and is slow
already where thousands of runs wait for their pods."""
QUEUE_FIRST_SECONDS, QUEUE_SECONDS = 2.0, 15.0
"""The same two for Kueue, which makes its Workload a moment after a run's object."""
QUEUE_VERSIONS = ("v1beta2", "v1beta1")
"""Of Kueue's API, the newest first."""
_TELLING = {"Evicted": "True", "QuotaReserved": "False", "Requeued": "False"}
"""Conditions of a Workload that say why it waits, with the status in which they do."""
MOST = 50
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Answer:
    subject: str
    asked: datetime
    said: tuple[Complaint, ...]


class Complaints:
    """Keeps what was last heard of each job; `again(key, seconds)` has a job looked at later."""

    def __init__(self, api: Api, again: Callable[[Key, float], None]) -> None:
        self._api, self._again = api, again
        self._answers: dict[Key, _Answer] = {}
        self._turns: dict[Key, datetime] = {}
        self._next_turn = datetime.min.replace(tzinfo=UTC)

    def forget(self, key: Key) -> None:
        self._answers.pop(key, None)
        self._turns.pop(key, None)

    async def about(self, key: Key, seen: Observed, now: datetime) -> tuple[Complaint, ...]:
        """Warnings about the job's run that has not begun, newest first; none where its pods say enough."""
        run = _not_begun(seen)
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
        if known is not None and known.subject == subject and now - known.asked < timedelta(seconds=pause):
            self._again(key, pause - (now - known.asked).total_seconds())
        elif self._has_turn(key, now):
            said = await (self._ask_queue(key[0], run) if held else self._ask(key[0], subject, run))
            known = _Answer(subject, now, said)
            self._answers[key] = known
            self._again(key, pause)
        return known.said if known is not None and known.subject == subject else ()

    def _has_turn(self, key: Key, now: datetime) -> bool:
        """Whether the job may ask now; if not, it is looked at again when it may."""
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

    async def _ask(self, namespace: str, subject: str, run: RunView) -> tuple[Complaint, ...]:
        query = f"fieldSelector=type%3DWarning%2CinvolvedObject.name%3D{subject}&limit={MOST}"
        try:
            page = await self._api.get(f"/api/v1/namespaces/{namespace}/events?{query}") or {}
        except ApiException as error:  # without that right the job runs as well, and says less
            log.warning("events of %s/%s: %s", namespace, subject, error.reason)
            return ()
        return complaints_of(page.get("items") or [], run.created, ENGINES[run.engine].create_failures)

    async def _ask_queue(self, namespace: str, run: RunView) -> tuple[Complaint, ...]:
        query = f"namespaces/{namespace}/workloads?labelSelector=kueue.x-k8s.io%2Fjob-uid%3D{run.uid}"
        try:
            for version in QUEUE_VERSIONS:
                page = await self._api.get(f"/apis/kueue.x-k8s.io/{version}/{query}")
                if page is not None:
                    return tuple(filter(None, map(queue_words, page.get("items") or [])))
        except ApiException as error:  # without that right the job queues as well, and says less
            log.warning("workloads of %s/%s: %s", namespace, run.name, error.reason)
        return ()


def queue_words(workload: Json) -> Complaint | None:
    """Return Kueue's own words on a Workload that is not admitted: who preempted it, and what it waits for."""
    found = (workload.get("status") or {}).get("conditions") or []
    told = [item for item in found if item.get("status") == _TELLING.get(item.get("type"))]
    words = [f"{item['reason']}: {item.get('message', '')}".removesuffix(": ") for item in told]
    return Complaint("Queued", "; ".join(dict.fromkeys(words))) if words else None


def complaints_of(events: list[Json], since: datetime, create_failures: tuple[str, ...] = ()) -> tuple[Complaint, ...]:
    """Return the events since then, newest first: an older object may have had the same name.

    Args:
        create_failures: reasons of events that say that pods cannot be created.
    """
    told = sorted(((_time(item), item) for item in events), key=lambda pair: pair[0], reverse=True)
    recent = (item for time, item in told if time >= since.replace(microsecond=0))
    said = ((item.get("reason") or "", item.get("message") or "") for item in recent)
    return tuple(Complaint(reason, message, reason in create_failures) for reason, message in said)


def _time(event: Json) -> datetime:
    series = event.get("series") or {}
    found = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return moment(found or event["metadata"]["creationTimestamp"])


def _not_begun(seen: Observed) -> RunView | None:
    """The newest run of the job that is to begin, or that a queue holds."""
    waits = (RunState.PENDING, RunState.QUEUED)
    runs = [run for run in seen.runs if run.owner == seen.uid and run.state in waits and not run.deleting]
    return max(runs, key=lambda run: run.run, default=None)


def _subject(seen: Observed, run: RunView) -> str | None:
    """Name of the object that knows: who makes the pods where there are none, else a pod that its node can't start.

    For a run that a queue holds it is the run's uid, by which the queue's own object is found.
    """
    if run.state is RunState.QUEUED:
        return run.uid
    pods = [pod for pod in seen.pods_of(run.run) if not pod.gone and pod.grace_over is None]
    if not pods:
        return run.pods_maker or run.name
    if waiting(pods) is not None:
        return None
    return next((pod.name for pod in pods if pod.node is not None and pod.phase == "Pending"), None)
