"""Decision steps that stop an attempt: the deadline and `runPolicy.suspend` (pure)."""

from __future__ import annotations

from datetime import timedelta

from finetune_operator.core.conditions import Reason, Type, moment
from finetune_operator.core.names import PREFLIGHT_RUN
from finetune_operator.core.snapshot import ENDED, RunView
from finetune_operator.decide.actions import DeleteRun, StopRun
from finetune_operator.decide.status_builder import Draft


def deadline(draft: Draft) -> bool:
    """After `activeDeadlineSeconds`, let the attempt save a checkpoint and fail the job."""
    seconds, started = draft.policy.active_deadline_seconds, draft.status.get("startTime")
    if seconds is None or started is None:
        return False
    end = moment(started) + timedelta(seconds=seconds)
    if end > draft.now:
        draft.wake_at(end)
        return False
    message = f"ran longer than runPolicy.activeDeadlineSeconds ({seconds} s); its last checkpoint is kept"
    run = draft.active()
    if run is not None and _stop(draft, run, Reason.DEADLINE):
        return True
    draft.status["failure"] = {"reason": Reason.DEADLINE.value, "message": message}
    return draft.fail(Reason.DEADLINE, message)


def suspend(draft: Draft) -> bool:
    """Suspend a job: its attempt saves a checkpoint, then all of its pods are deleted."""
    run = draft.active()
    if not draft.policy.suspend:
        draft.resumed()
        return False
    if run is not None and _stop(draft, run, Reason.SUSPENDED):
        draft.set(Type.SUSPENDED, "False", Reason.STOPPING, "saving a checkpoint")
        return True
    _drop_preflight(draft)
    last = draft.status.get("lastCheckpoint")
    kept = f"resumes from step {last['step']} of stage {last['stage'] + 1}" if last else "no checkpoint was saved yet"
    draft.set(Type.RUNNING, "False", Reason.SUSPENDED)
    draft.set(Type.SUSPENDED, "True", Reason.SUSPENDED, kept)
    draft.status.pop("startTime", None)
    return True


def _drop_preflight(draft: Draft) -> None:
    """Delete preflight, since a suspended job has no pods: it starts again when the job is resumed."""
    run = draft.seen.run(PREFLIGHT_RUN)
    if run is None or run.state in ENDED:
        return
    draft.set(Type.PLANNED, "Unknown", Reason.SUSPENDED)
    if not run.deleting:
        draft.do(DeleteRun(run.run, run.engine))


def _stop(draft: Draft, run: RunView, reason: Reason) -> bool:
    """Ask for a checkpoint, wait for the grace period, then delete the run; return False once it is gone."""
    requested = draft.stop_asked(run.run)
    if run.deleting:
        draft.set(Type.RUNNING, "False", Reason.STOPPING, "the pods are in their grace period")
        return True
    grace = draft.kubernetes.checkpoint_grace_seconds
    runs = draft.trains(run)
    if runs and requested is None:
        draft.ask_stop(run.run)
        draft.do(StopRun(run.run))
        draft.wake_at(draft.now + timedelta(seconds=grace))
    elif requested is not None and requested + timedelta(seconds=grace) > draft.now:
        draft.do(StopRun(run.run))  # again: the first request may not have been received
        draft.wake_at(min(requested + timedelta(seconds=grace), draft.now + timedelta(seconds=5)))
    else:
        draft.do(DeleteRun(run.run, run.engine))
    draft.set(Type.RUNNING, "True" if runs else "False", Reason.STOPPING)
    draft.stop_reason(run.run, reason)
    return True
