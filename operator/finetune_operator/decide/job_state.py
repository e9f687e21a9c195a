"""The state of a job that the steps of `decide` read: its snapshot, spec, status and conditions (pure)."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

from finetune_api.cluster import RunPolicy
from finetune_api.kubernetes import Kubernetes
from finetune_operator.core import names
from finetune_operator.core.conditions import Condition, Reason, Type, moment
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, RunState, RunView
from finetune_operator.decide import attempts

Json = dict[str, Any]
_OPEN = (RunState.QUEUED, RunState.PENDING, RunState.RUNNING)


class JobState:
    """Questions about a job, answered from its snapshot and from the status that is being built."""

    def __init__(self, seen: Observed, settings: Settings, now: datetime) -> None:
        self.seen, self.settings, self.now = seen, settings, now
        self.spec: Json = seen.body.get("spec", {})
        self.before: Json = seen.body.get("status") or {}
        self.status: Json = copy.deepcopy(self.before)
        self._conditions = {item["type"]: _condition(item) for item in self.status.get("conditions", [])}

    @property
    def policy(self) -> RunPolicy:
        return RunPolicy.model_validate(self.spec.get("runPolicy", {}))

    @property
    def kubernetes(self) -> Kubernetes:
        return Kubernetes.model_validate(self.spec.get("kubernetes", {}))

    def holds(self, kind: Type) -> bool:
        condition = self._conditions.get(kind.value)
        return condition is not None and condition.status == "True"

    def stopping(self) -> bool:
        """Whether the attempt's pods have run, so that it is now stopping if they no longer all do."""
        condition = self._conditions.get(Type.RUNNING.value)
        return condition is not None and condition.reason in (Reason.TRAINING, Reason.STOPPING)

    def trains(self, run: RunView) -> bool:
        """Whether all pods of a run are ready, or were ready and none has ended.

        Pods of a node that does not answer for a while become unready and keep running.
        """
        if run.state is RunState.RUNNING:
            return True
        pods = self.seen.pods_of(run.run)
        return run.state is RunState.PENDING and self.holds(Type.RUNNING) and bool(pods) and all(p.runs for p in pods)

    def active(self) -> RunView | None:
        """Return the active attempt's run, or None."""
        own = (run for run in self.seen.runs if run.run > 0 and run.owner == self.seen.uid and run.state in _OPEN)
        return max((run for run in own if not self.closed(run.run)), key=lambda run: run.run, default=None)

    def closed(self, number: int) -> bool:
        """Whether an attempt counts as ended, even if some of its objects still exist."""
        return attempts.closed(self.status, number)

    def admitted(self) -> datetime | None:
        """Return since when no queue holds the attempt according to the previous status; None without the condition.

        If a queue held it in the previous status, that is now.
        """
        found = (item for item in self.before.get("conditions", []) if item["type"] == Type.ADMITTED.value)
        before = next(found, None)
        if before is None:
            return None
        return moment(before["lastTransitionTime"]) if before["status"] == "True" else self.now

    def stop_asked(self, number: int) -> datetime | None:
        record = attempts.record_of(self.status, number) or {}
        return moment(record["stopRequestedTime"]) if "stopRequestedTime" in record else None

    def token_name(self, run: RunView) -> str:
        """Return the name of the Secret with an attempt's token."""
        return names.support_name(run.job, run.run, self.seen.uid, self.settings.token_key)

    def going(self) -> bool:
        """Whether the job is being deleted."""
        return "deletionTimestamp" in self.seen.body["metadata"]

    def changed(self) -> bool:
        """Whether the spec has changed since the previous status."""
        return bool(self.before.get("observedGeneration") != self.seen.body["metadata"].get("generation", 1))

    def queued(self) -> bool:
        """Whether the job has a queue, which decides when its attempts may start."""
        return names.QUEUE_LABEL in (self.seen.body["metadata"].get("labels") or {})

    def held(self) -> bool:
        """Whether the job has the finalizer that keeps it until its storage is emptied."""
        return names.FINALIZER in (self.seen.body["metadata"].get("finalizers") or [])


def _condition(item: Json) -> Condition:
    return Condition(Type(item["type"]), item["status"], Reason(item["reason"]), item.get("message", ""))
