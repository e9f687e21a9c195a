"""The operator lists events only for runs of a minimum age, with a limit per minute for all jobs together."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from support.operator.worlds import NOW, pod, run, seen

from finetune_operator.core.snapshot import Observed, RunState
from finetune_operator.observe.warning_events import (
    EVERY_SECONDS,
    FIRST_SECONDS,
    PAUSE_SECONDS,
    QUEUE_SECONDS,
    Complaints,
)

Json = dict[str, Any]
MESSAGE = "pods are forbidden: exceeded quota"


class Events:
    """An API server with one event from `NOW` that counts its requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def get(self, path: str) -> Json:
        self.asked.append(path)
        event = {"reason": "FailedCreate", "message": MESSAGE, "lastTimestamp": NOW.isoformat(), "metadata": {}}
        return {"items": [event]}


def waiting(age: float) -> Observed:
    return seen(None, run(state=RunState.PENDING, age=age))


def ask(complaints: Complaints, job: str, world: Observed, later: float = 0) -> tuple[str, ...]:
    said = asyncio.run(complaints.about(("team", job), world, NOW + timedelta(seconds=later)))
    return tuple(item.message for item in said)


def made() -> tuple[Events, dict[str, float], Complaints]:
    events, again = Events(), dict[str, float]()
    return events, again, Complaints(events, lambda key, seconds: again.__setitem__(key[1], seconds))  # type: ignore[arg-type]


def test_an_old_run_without_pods_is_asked_about_once_a_minute() -> None:
    events, again, complaints = made()
    assert ask(complaints, "a", waiting(FIRST_SECONDS - 5)) == () and again["a"] == 5
    assert ask(complaints, "a", waiting(FIRST_SECONDS)) == (MESSAGE,) and again["a"] == PAUSE_SECONDS
    assert ask(complaints, "a", waiting(FIRST_SECONDS), 10) == (MESSAGE,) and again["a"] == PAUSE_SECONDS - 10
    assert len(events.asked) == 1 and "involvedObject.name%3Dtiny-1&" in events.asked[0]
    ask(complaints, "a", waiting(FIRST_SECONDS), PAUSE_SECONDS)
    assert len(events.asked) == 2


def test_pods_that_explain_themselves_and_runs_that_go_well_are_not_asked_about() -> None:
    events, _, complaints = made()
    unschedulable = pod(phase="Pending", node=None, unschedulable="0/3 nodes")
    for state, *pods in ((RunState.PENDING, unschedulable), (RunState.PENDING, pod(phase="Pending", node=None)),
                         (RunState.RUNNING,)):  # fmt: skip
        assert ask(complaints, "a", seen(None, run(state=state, age=100), *pods)) == ()
    assert events.asked == []


def test_a_run_that_a_queue_holds_is_told_in_the_queue_s_words() -> None:
    """The message is that of Kueue 0.19's Workload, which is found by the uid of the run."""
    preempted = "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue"
    quota = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor default"
    found = {"status": {"conditions": [
        {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": quota},
        {"type": "Evicted", "status": "True", "reason": "Preempted", "message": preempted},
        {"type": "PodsReady", "status": "False", "reason": "WaitForStart", "message": "not ready"}]}}  # fmt: skip
    asked: list[str] = []

    class Kueue:
        async def get(self, path: str) -> Json | None:
            asked.append(path)
            return {"items": [found]} if "/v1beta1/" in path else None

    complaints = Complaints(Kueue(), lambda key, seconds: None)  # type: ignore[arg-type]
    world = seen(None, run(state=RunState.QUEUED, age=5, uid="u-1"))
    assert ask(complaints, "a", world) == (f"Pending: {quota}; Preempted: {preempted}",)
    assert asked[-1].endswith("/namespaces/team/workloads?labelSelector=kueue.x-k8s.io%2Fjob-uid%3Du-1")
    ask(complaints, "a", world, QUEUE_SECONDS - 1)
    assert len(asked) == 2, "the second is for a cluster with an older Kueue"


def test_thousands_that_wait_ask_in_turn_and_no_faster() -> None:
    events, again, complaints = made()
    jobs = [f"job-{n}" for n in range(5000)]
    for job in jobs:
        ask(complaints, job, waiting(100))
    assert len(events.asked) == 1
    turns = sorted(again[job] for job in jobs[1:])
    within = [turn for turn in turns if turn < PAUSE_SECONDS]
    assert len(within) <= PAUSE_SECONDS / EVERY_SECONDS and within[:2] == [EVERY_SECONDS, 2 * EVERY_SECONDS]
    assert ask(complaints, "job-1", waiting(100), EVERY_SECONDS) == (MESSAGE,)
