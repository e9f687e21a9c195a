"""The status being worked out, and what goes with it: what the steps of `decide` write on."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_api.cluster import RunPolicy
from finetune_api.kubernetes import Kubernetes
from finetune_api.report import AttemptReport
from finetune_operator.core import names
from finetune_operator.core.conditions import Condition, Reason, Status, Type, merged, moment, stamp
from finetune_operator.core.report_validation import cleaned, fits
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, RunState, RunView
from finetune_operator.decide import attempts, printer_columns
from finetune_operator.decide.actions import Action, Decision, DeleteRun, Event, StartRun
from finetune_operator.decide.classify import Ending
from finetune_operator.decide.secret_redaction import hidden, secret_literals, without
from finetune_operator.decide.settled_runs import settled
from finetune_operator.decide.stalls import disliked, told_away

Json = dict[str, Any]
PROGRESS_FIELDS = ("step", "loss", "eta", "progress", "stages", "lastCheckpoint")
_OPEN = (RunState.QUEUED, RunState.PENDING, RunState.RUNNING)
_TROUBLES = (Reason.UNSCHEDULABLE, Reason.IMAGE_PULL, Reason.POD_CONFIG, Reason.ENGINE_MISSING, Reason.BACK_OFF,
             Reason.REJECTED, Reason.FORBIDDEN, Reason.NOT_STARTED)  # fmt: skip
_NEWS = {
    (Type.PLANNED, Reason.PREFLIGHT_PASSED),
    (Type.ADMITTED, Reason.QUEUED),
    (Type.RUNNING, Reason.STARTING),
    (Type.RUNNING, Reason.TRAINING),
    (Type.RUNNING, Reason.STOPPING),
    (Type.SUSPENDED, Reason.SUSPENDED),
    (Type.SUSPENDED, Reason.RESUMED),
    (Type.SUCCEEDED, Reason.COMPLETED),
}


class Draft:
    """One decision in the making. Everything but this object stays as it is."""

    def __init__(self, seen: Observed, settings: Settings, now: datetime) -> None:
        self.settings, self.now = settings, now
        self.seen, self._wake = settled(seen, now)
        self.spec: Json = seen.body.get("spec", {})
        self.before: Json = seen.body.get("status") or {}
        self.status: Json = copy.deepcopy(self.before)
        self._conditions = {item["type"]: _condition(item) for item in self.status.get("conditions", [])}
        self._actions: list[Action] = []
        self._events: list[Event] = []

    # what stands

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
        """Whether the attempt has run, and is told or seen to end."""
        condition = self._conditions.get(Type.RUNNING.value)
        return condition is not None and condition.reason in (Reason.TRAINING, Reason.STOPPING)

    def trains(self, run: RunView) -> bool:
        """Whether its pods run: all are ready, or were and none has ended. A node that doesn't answer for a while makes
        its pods unready, and they run on."""
        if run.state is RunState.RUNNING:
            return True
        pods = self.seen.pods_of(run.run)
        return run.state is RunState.PENDING and self.holds(Type.RUNNING) and bool(pods) and all(p.runs for p in pods)

    def active(self) -> RunView | None:
        """The attempt that is on its way, if any."""
        own = (run for run in self.seen.runs if run.run > 0 and run.owner == self.seen.uid and run.state in _OPEN)
        return max((run for run in own if not self.closed(run.run)), key=lambda run: run.run, default=None)

    def closed(self, number: int) -> bool:
        """Whether an attempt counts as ended, whatever may still be there of it."""
        return attempts.closed(self.status, number)

    def admitted(self) -> datetime | None:
        """Return since when no queue holds the attempt, as the status that stands has it; None where it says nothing.

        That is now, where a queue did hold it.
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
        """Name of the Secret with an attempt's token."""
        return names.support_name(run.job, run.run, self.seen.uid, self.settings.token_key)

    def going(self) -> bool:
        """Whether somebody has asked for the job's deletion."""
        return "deletionTimestamp" in self.seen.body["metadata"]

    def changed(self) -> bool:
        """Whether the spec is another one than that of the last look."""
        return bool(self.before.get("observedGeneration") != self.seen.body["metadata"].get("generation", 1))

    def queued(self) -> bool:
        """Whether a queue decides when its attempts may start."""
        return names.QUEUE_LABEL in (self.seen.body["metadata"].get("labels") or {})

    def held(self) -> bool:
        """Whether it waits for its storage to be emptied."""
        return names.FINALIZER in (self.seen.body["metadata"].get("finalizers") or [])

    # what to do

    def do(self, action: Action) -> None:
        self._actions.append(action)

    def wake_at(self, when: datetime) -> None:
        self._wake = when if self._wake is None else min(self._wake, when)

    def event(self, kind: str, reason: str, message: str) -> None:
        self._events.append(Event(kind, reason, message))  # type: ignore[arg-type]

    # conditions

    def set(self, kind: Type, status: Status, reason: Reason, message: str = "") -> None:
        before = self._conditions.get(kind.value)
        self._conditions[kind.value] = Condition(kind, status, reason, message)
        if before is None or (before.status, before.reason) != (status, reason):
            admitted = kind is Type.ADMITTED and status == "True" and before is not None
            self._tell(self._conditions[kind.value], admitted)

    def _tell(self, news: Condition, admitted: bool) -> None:
        """An event for each change that people see in the phase, or must act on."""
        if (
            news.type is Type.FAILED
            or (news.type is Type.STALLED and news.status == "True")
            or (news.reason in _TROUBLES and news.message)
        ):
            self.event("Warning", news.reason.value, news.message)
        elif (news.type, news.reason) in _NEWS or admitted:
            said = f"attempt {self.status['attempt']}" if self.status.get("attempt") else news.type.value
            self.event("Normal", news.reason.value, news.message or said)

    def succeed(self) -> None:
        self.set(Type.RUNNING, "False", Reason.COMPLETED)
        if self.holds(Type.STALLED):
            self.set(Type.STALLED, "False", Reason.COMPLETED)
        self.set(Type.SUCCEEDED, "True", Reason.COMPLETED)
        self.status["completionTime"] = stamp(self.now)
        self.status.pop("failure", None)

    def fail(self, reason: Reason, message: str) -> bool:
        self.set(Type.RUNNING, "False", reason)
        self.set(Type.FAILED, "True", reason, message)
        self.status["completionTime"] = stamp(self.now)
        self.status.setdefault("failure", {"reason": reason.value, "message": message})
        return True

    # attempts

    def attempt_seen(self, run: RunView) -> Json:
        """The run's record, made where the operator ended between starting the run and writing it down."""
        record = attempts.record_of(self.status, run.run)
        if record is None:
            if run.run >= attempts.next_number(self.status):  # what stands is said of the attempt before
                self._conditions.pop(Type.RUNNING.value, None)
            record = {"number": run.run, "startTime": stamp(run.created)}
            self.status["attempts"] = sorted(
                [*attempts.records(self.status), record], key=lambda item: int(item["number"])
            )
        self.status["attempt"] = max(item["number"] for item in attempts.records(self.status))
        return record

    def start_attempt(self) -> None:
        number = attempts.next_number(self.status)
        self.status["attempts"] = [*attempts.records(self.status), {"number": number, "startTime": stamp(self.now)}]
        self.status["attempt"] = number
        attempts.trimmed(self.status)
        self.status.pop("transport", None)  # of the attempt before
        rather_not = disliked(self.status)
        self.set(Type.RUNNING, "False", Reason.STARTING, told_away(self.status))
        self.do(StartRun(number, attempts.avoided(self.status), rather_not))

    def resumed(self) -> None:
        """The job is not to be suspended any more."""
        condition = self._conditions.get(Type.SUSPENDED.value)
        if condition is not None and condition.reason is not Reason.RESUMED:
            self.set(Type.SUSPENDED, "False", Reason.RESUMED)

    def attempt_ended(self, run: RunView, ending: Ending) -> None:
        record = self.attempt_seen(run)
        if "endTime" in record:
            return
        self._close(record, ending, run.ended or self.now)
        if ending.reason is Reason.STALLED:
            self.set(Type.STALLED, "True", Reason.STALLED, ending.message)
        self.failure(ending, run.run)
        self.event("Warning", ending.reason.value, f"attempt {run.run}: {ending.message}")

    def attempt_succeeded(self, run: RunView) -> None:
        record = self.attempt_seen(run)
        record.setdefault("endTime", stamp(run.ended or self.now))
        record |= {"reason": Reason.COMPLETED.value, "message": "", "retryable": False, "counts": False}

    def attempts_gone(self) -> None:
        """An attempt on record whose run is there no more: deleted by this operator, or behind its back."""
        for record in attempts.records(self.status):
            if "endTime" not in record and self.seen.run(record["number"]) is None:
                ending = _gone(record)
                self._close(record, ending, self.now)
                if ending.reason is Reason.DELETED:
                    self.event("Warning", ending.reason.value, f"attempt {record['number']}: {ending.message}")

    def _close(self, record: Json, ending: Ending, ended: datetime) -> None:
        asked = record.get("stopReason")
        counts = ending.counts and asked not in (Reason.SUSPENDED.value, Reason.DEADLINE.value)
        record |= {
            "endTime": stamp(ended),
            "reason": ending.reason.value,
            "message": ending.message,
            "retryable": ending.retryable or asked == Reason.SUSPENDED.value or self._memory_sufficed(record, ending),
            "counts": counts,
            "requested": asked == Reason.SUSPENDED.value,
            "checkpoint": self.status.get("lastCheckpoint", {}).get("uri"),
            **({"faultyNode": ending.node} if ending.faulty_node else {}),
            **({"stalledNode": ending.node} if ending.stalled and ending.node else {}),
            "exitCode": ending.exit_code,
            "stage": self.status.get("progress", {}).get("stageIndex"),
            "step": self.status.get("progress", {}).get("step"),
        }

    def _memory_sufficed(self, record: Json, ending: Ending) -> bool:
        """Memory ran out of an attempt that had saved a checkpoint: it is enough as a rule, and the next may get by.

        One that never gets as far as a checkpoint needs another setting first.
        """
        memory = (Reason.OOM_KILLED, Reason.DEVICE_OOM, Reason.SHARED_MEMORY)
        return ending.reason in memory and attempts.progressed(self.status, record["number"])

    def ask_stop(self, number: int) -> None:
        record = attempts.record_of(self.status, number)
        if record is not None:
            record["stopRequestedTime"] = stamp(self.now)

    def stop_reason(self, number: int, reason: Reason, message: str = "") -> None:
        record = attempts.record_of(self.status, number)
        if record is not None:
            record |= {"stopReason": reason.value, "stopMessage": message}

    def running_since(self, run: RunView) -> None:
        self.status.setdefault("startTime", stamp(self.now))

    def failure(self, ending: Ending, number: int) -> None:
        found = {
            "reason": ending.reason.value,
            "message": ending.message,
            "pod": ending.pod,
            "node": ending.node,
            "exitCode": ending.exit_code,
            "traceback": ending.traceback or None,
            "attempt": number,
        }
        self.status["failure"] = {name: value for name, value in found.items() if value is not None}

    # progress

    def learn(self, report: AttemptReport | None) -> None:
        """Take over what a run said of itself."""
        if report is None or not fits(report, self.spec):
            return
        said = cleaned(report.to_json())
        if report.stages:
            self._tell_of_stages(said["stages"])
            self.status["stages"] = said["stages"]
        if report.checkpoint is not None:
            self.status["lastCheckpoint"] = said["checkpoint"]
        if report.transport is not None:
            self.status["transport"] = said["transport"]
        if report.plan is not None:
            self.status["plan"] = said["plan"]
        if report.step is not None:
            self.status["progress"] = said["step"] | {"stageIndex": report.current}

    def _tell_of_stages(self, stages: list[Json]) -> None:
        """An event for each stage that is done now and wasn't before."""
        before = [stage["state"] for stage in self.status.get("stages") or []]
        for index, stage in enumerate(stages):
            if stage["state"] == "Succeeded" and before[index : index + 1] != ["Succeeded"]:
                words = f"stage {index + 1}/{len(stages)} {stage['name']}"
                words += f": {stage['result']}" if stage.get("result") else ""
                self.event("Normal", Reason.STAGE_DONE.value, words)

    def plan_words(self) -> str:
        return printer_columns.plan_words(self.status.get("plan"))

    def decision(self) -> Decision:
        """The answer, with `phase` and the columns of `kubectl get` derived from the rest."""
        metadata = self.seen.body["metadata"]
        conditions = [self._conditions[kind.value] for kind in Type if kind.value in self._conditions]
        generation = metadata.get("generation", 1)
        self.status["conditions"] = merged(self.before.get("conditions", []), conditions, generation, self.now)
        self.status["observedGeneration"] = generation
        stopping = any(isinstance(action, DeleteRun) for action in self._actions)
        self.status |= printer_columns.columns(self.status, self.spec, stopping)
        if self.going():
            self.status["phase"] = "Deleting"
        literals = secret_literals(self.spec)
        if literals:
            self.status = hidden(self.status, literals)
            self._events = [replace(item, message=without(item.message, literals)) for item in self._events]
        urgent = bool(self._events) or _without_progress(self.status) != _without_progress(self.before)
        return Decision(self.status, tuple(self._actions), tuple(self._events), self._wake, urgent)


def _gone(record: Json) -> Ending:
    """The ending of a run that left nothing to ask."""
    reason = Reason(record.get("stopReason", Reason.DELETED.value))
    message = record.get("stopMessage") or ""
    if reason is Reason.DELETED:
        message = "its object was deleted; the next attempt goes on from the last checkpoint"
    return Ending(reason, message, retryable=reason is not Reason.DEADLINE, counts=reason not in
                  (Reason.SUSPENDED, Reason.DEADLINE, Reason.DELETED))  # fmt: skip


def _without_progress(status: Json) -> Json:
    return {name: value for name, value in status.items() if name not in PROGRESS_FIELDS}


def _condition(item: Json) -> Condition:
    return Condition(Type(item["type"]), item["status"], Reason(item["reason"]), item.get("message", ""))
