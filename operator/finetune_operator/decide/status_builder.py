"""The builder of a decision: the steps of `decide` write status, conditions, actions and events to it (pure)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Condition, Reason, Status, Type, merged, stamp
from finetune_operator.core.report_validation import cleaned, fits
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import Observed, RunView
from finetune_operator.decide import attempts, printer_columns
from finetune_operator.decide.actions import Action, Decision, DeleteRun, Event, StartRun
from finetune_operator.decide.classify import Ending
from finetune_operator.decide.job_state import JobState
from finetune_operator.decide.secret_redaction import hidden, secret_literals, without
from finetune_operator.decide.settled_runs import settled
from finetune_operator.decide.stalls import node_preference, stalled_nodes

Json = dict[str, Any]
PROGRESS_FIELDS = ("step", "loss", "eta", "progress", "stages", "lastCheckpoint")
_WARNING_REASONS = (Reason.UNSCHEDULABLE, Reason.IMAGE_PULL, Reason.POD_CONFIG, Reason.ENGINE_MISSING, Reason.BACK_OFF,
             Reason.REJECTED, Reason.FORBIDDEN, Reason.NOT_STARTED)  # fmt: skip
_NORMAL_EVENTS = {
    (Type.PLANNED, Reason.PREFLIGHT_PASSED),
    (Type.ADMITTED, Reason.QUEUED),
    (Type.RUNNING, Reason.STARTING),
    (Type.RUNNING, Reason.TRAINING),
    (Type.RUNNING, Reason.STOPPING),
    (Type.SUSPENDED, Reason.SUSPENDED),
    (Type.SUSPENDED, Reason.RESUMED),
    (Type.SUCCEEDED, Reason.COMPLETED),
}


class Draft(JobState):
    """Status, conditions, actions and events of one decision. The snapshot itself is not changed."""

    def __init__(self, seen: Observed, settings: Settings, now: datetime) -> None:
        current, self._wake = settled(seen, now)
        super().__init__(current, settings, now)
        self._actions: list[Action] = []
        self._events: list[Event] = []

    def do(self, action: Action) -> None:
        self._actions.append(action)

    def wake_at(self, when: datetime) -> None:
        self._wake = when if self._wake is None else min(self._wake, when)

    def event(self, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        self._events.append(Event(kind, reason, message))

    # conditions

    def set(self, kind: Type, status: Status, reason: Reason, message: str = "") -> None:
        before = self._conditions.get(kind.value)
        self._conditions[kind.value] = Condition(kind, status, reason, message)
        if before is None or (before.status, before.reason) != (status, reason):
            admitted = kind is Type.ADMITTED and status == "True" and before is not None
            self._emit(self._conditions[kind.value], admitted)

    def _emit(self, changed: Condition, admitted: bool) -> None:
        """Emit an event if the change of a condition is visible in the phase or needs a user's action."""
        if (
            changed.type is Type.FAILED
            or (changed.type is Type.STALLED and changed.status == "True")
            or (changed.reason in _WARNING_REASONS and changed.message)
        ):
            self.event("Warning", changed.reason.value, changed.message)
        elif (changed.type, changed.reason) in _NORMAL_EVENTS or admitted:
            subject = f"attempt {self.status['attempt']}" if self.status.get("attempt") else changed.type.value
            self.event("Normal", changed.reason.value, changed.message or subject)

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
        """Return a run's record; add it if an operator was stopped between starting the run and recording it."""
        record = attempts.record_of(self.status, run.run)
        if record is None:
            if run.run >= attempts.next_number(self.status):  # the condition is the previous attempt's
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
        self.status.pop("transport", None)  # of the previous attempt
        self.set(Type.RUNNING, "False", Reason.STARTING, node_preference(self.status))
        self.do(StartRun(number, attempts.avoided(self.status), stalled_nodes(self.status)))

    def resumed(self) -> None:
        """Mark a suspended job as resumed."""
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
        """End the recorded attempts whose run no longer exists: the operator or another client has deleted it."""
        for record in attempts.records(self.status):
            if "endTime" not in record and self.seen.run(record["number"]) is None:
                ending = _gone(record)
                self._close(record, ending, self.now)
                if ending.reason is Reason.DELETED:
                    self.event("Warning", ending.reason.value, f"attempt {record['number']}: {ending.message}")

    def _close(self, record: Json, ending: Ending, ended: datetime) -> None:
        stop_reason = record.get("stopReason")
        suspended = stop_reason == Reason.SUSPENDED.value
        counts = ending.counts and not suspended and stop_reason != Reason.DEADLINE.value
        record |= {
            "endTime": stamp(ended),
            "reason": ending.reason.value,
            "message": ending.message,
            "retryable": ending.retryable
            or stop_reason == Reason.SUSPENDED.value
            or self._memory_sufficed(record, ending),
            "counts": counts,
            "requested": suspended,
            "checkpoint": self.status.get("lastCheckpoint", {}).get("uri"),
            **({"faultyNode": ending.node} if ending.faulty_node else {}),
            **({"stalledNode": ending.node} if ending.stalled and ending.node else {}),
            "exitCode": ending.exit_code,
            "stage": self.status.get("progress", {}).get("stageIndex"),
            "step": self.status.get("progress", {}).get("step"),
        }

    def _memory_sufficed(self, record: Json, ending: Ending) -> bool:
        """Whether an attempt that ran out of memory had saved a checkpoint before: then a retry may succeed.

        An attempt that never reaches a checkpoint needs other settings first.
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
        """Copy a run's report to the status, unless it does not fit the job's stages."""
        if report is None or not fits(report, self.spec):
            return
        content = cleaned(report.to_json())
        if report.stages:
            self._emit_stages(content["stages"])
            self.status["stages"] = content["stages"]
        if report.checkpoint is not None:
            self.status["lastCheckpoint"] = content["checkpoint"]
        if report.transport is not None:
            self.status["transport"] = content["transport"]
        if report.plan is not None:
            self.status["plan"] = content["plan"]
        if report.step is not None:
            self.status["progress"] = content["step"] | {"stageIndex": report.current}

    def _emit_stages(self, stages: list[Json]) -> None:
        """Emit an event for each stage that has succeeded since the last report."""
        before = [stage["state"] for stage in self.status.get("stages") or []]
        for index, stage in enumerate(stages):
            if stage["state"] == "Succeeded" and before[index : index + 1] != ["Succeeded"]:
                message = f"stage {index + 1}/{len(stages)} {stage['name']}"
                message += f": {stage['result']}" if stage.get("result") else ""
                self.event("Normal", Reason.STAGE_DONE.value, message)

    def plan_summary(self) -> str:
        return printer_columns.plan_summary(self.status.get("plan"))

    def decision(self) -> Decision:
        """Return the decision, with `phase` and the columns of `kubectl get` derived from the rest."""
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
    """Return the end of a run whose objects are gone."""
    reason = Reason(record.get("stopReason", Reason.DELETED.value))
    message = record.get("stopMessage") or ""
    if reason is Reason.DELETED:
        message = "its object was deleted; the next attempt resumes from the last checkpoint"
    return Ending(reason, message, retryable=reason is not Reason.DEADLINE, counts=reason not in
                  (Reason.SUSPENDED, Reason.DEADLINE, Reason.DELETED))  # fmt: skip


def _without_progress(status: Json) -> Json:
    return {name: value for name, value in status.items() if name not in PROGRESS_FIELDS}
