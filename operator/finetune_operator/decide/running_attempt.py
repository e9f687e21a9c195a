"""The decision step for an active attempt (pure)."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason, Type, moment
from finetune_operator.core.report_validation import clean
from finetune_operator.core.snapshot import RunState, RunView
from finetune_operator.decide import attempts
from finetune_operator.decide.actions import DeleteRun, StartRun
from finetune_operator.decide.checkpoint_annotations import mark_checkpoint
from finetune_operator.decide.classify import waiting
from finetune_operator.decide.preflight import begun, patience
from finetune_operator.decide.queueing import held, refuse
from finetune_operator.decide.stalls import follow_stall, node_preference, slow_node
from finetune_operator.decide.status_builder import Draft


def follow(draft: Draft) -> bool:
    """Update the conditions of an active attempt."""
    run = draft.active()
    assert run is not None
    if run.elsewhere:
        return refuse(draft, run)
    if run.state is RunState.QUEUED:
        return held(draft, run)
    draft.set(Type.ADMITTED, "True", Reason.NOT_QUEUED)
    stuck = waiting(draft.seen.pods_of(run.run), draft.seen.complaints)
    if run.deleting:
        draft.set(Type.RUNNING, "False", Reason.STOPPING, "the run is being deleted")
    elif draft.trains(run):
        draft.set(Type.RUNNING, "True", Reason.TRAINING, _hindrance(draft, run) if stuck is None else stuck[1])
        draft.running_since(run)
        follow_stall(draft, run)
        mark_checkpoint(draft, run)
    elif stuck is not None:
        _stuck(draft, run, *stuck)
    elif draft.stopping():
        draft.set(Type.RUNNING, "False", Reason.STOPPING, "some pods have ended, the others follow")
    else:
        _starting(draft, run)
    return True


def _starting(draft: Draft, run: RunView, message: str = "") -> None:
    """Report what the engine waits for; delete the run after `engine_seconds` if only the engine holds it."""
    draft.set(Type.RUNNING, "False", Reason.STARTING, message or run.message or node_preference(draft.status))
    pods = draft.seen.pods_of(run.run)
    trains = draft.seen.report is not None and draft.seen.report.step is not None
    if run.message and not trains and all(pod.ready for pod in pods):
        since = max([begun(draft, run), *(moment(pod.ready_since) for pod in pods if pod.ready_since)])
        limit = draft.seen.engines.start_seconds.get(run.engine, 0)
        _limit(draft, run, Reason.NOT_STARTED, message or run.message, limit, since)


def _hindrance(draft: Draft, run: RunView) -> str:
    """Return what slows or interrupts the training of a running attempt; empty if nothing does."""
    report = draft.seen.report or AttemptReport()
    waits = f"waiting for storage: {clean(report.waiting)}" if report.waiting else ""
    again = f"restarting from the last checkpoint: {clean(report.restarting)}" if report.restarting else ""
    transport = clean(report.transport.warning or "") if report.transport else ""
    return _unready(draft, run) or clean(report.placing or "") or waits or again or slow_node(report) or transport


def _unready(draft: Draft, run: RunView) -> str:
    unready = next((pod for pod in draft.seen.pods_of(run.run) if pod.runs and not pod.ready), None)
    if run.state is RunState.RUNNING or unready is None:
        return ""
    return f"pod {unready.name} is not ready: its node {unready.node} may be lost; the job continues while its pods run"


def _stuck(draft: Draft, run: RunView, reason: Reason, message: str) -> None:
    """Report why the pods do not start; delete the run after the limit, which then counts as failed."""
    avoided = attempts.avoided(draft.status)
    if reason is Reason.UNSCHEDULABLE and avoided:
        message += f" (not on {', '.join(avoided)}, where a GPU failed)"
    if reason is Reason.STARTING:
        _starting(draft, run, message)
        return
    draft.set(Type.RUNNING, "False", reason, message)
    if reason is Reason.POD_CONFIG and draft.token_name(run) in message:
        draft.do(StartRun(run.run))  # the operator was stopped before it created the Secret
    _limit(draft, run, reason, message, patience(reason, draft.settings), begun(draft, run))


def _limit(draft: Draft, run: RunView, reason: Reason, message: str, seconds: int, since: datetime) -> None:
    """Delete a run that has waited for `seconds`: it then counts as failed. 0 means no limit."""
    if not seconds:
        return
    end = since + timedelta(seconds=seconds)
    if end > draft.now:
        draft.wake_at(end)
    else:
        draft.stop_reason(run.run, reason, message)
        draft.do(DeleteRun(run.run, run.engine))
