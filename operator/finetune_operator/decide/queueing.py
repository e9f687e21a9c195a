"""Decision steps for a run that a queue (Kueue) holds or has sent to another cluster (pure)."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.core.conditions import Reason, Type
from finetune_operator.core.snapshot import RunState, RunView
from finetune_operator.decide.actions import DeleteRun
from finetune_operator.decide.classify import waiting
from finetune_operator.decide.status_builder import Draft


def held(draft: Draft, run: RunView) -> bool:
    """Report that a queue holds the attempt.

    The time in the queue does not count towards `activeDeadlineSeconds`: it starts again with the admission, as after a
    suspension and as for Jobs.
    """
    draft.set(Type.ADMITTED, "False", Reason.QUEUED, queue_message(draft, run))
    going = any(not pod.over for pod in draft.seen.pods_of(run.run))
    draft.set(Type.RUNNING, "False", Reason.QUEUED, "the pods save a checkpoint and stop" if going else "")
    draft.status.pop("startTime", None)
    return True


def refuse(draft: Draft, run: RunView) -> bool:
    """Fail a job whose queue sends it to another cluster, where this operator cannot see its pods."""
    message = (
        f"{run.name} is managed by {run.elsewhere}, which runs it in another cluster, where this operator cannot "
        "follow it. Choose a queue of this cluster"
    )
    draft.do(DeleteRun(run.run, run.engine))
    draft.stop_reason(run.run, Reason.REJECTED, message)
    draft.status.pop("failure", None)
    return draft.fail(Reason.REJECTED, message)


def queue_message(draft: Draft, run: RunView) -> str:
    """Return Kueue's message, or the engine's if Kueue has none."""
    return next((warning.message for warning in draft.seen.complaints), "") or run.message


def queue_limit(draft: Draft, run: RunView) -> datetime | None:
    """Return until when a queue may hold a preflight or a clean-up; None if no queue holds it or there is no limit."""
    seconds = draft.settings.helper_queue_seconds
    if run.state is not RunState.QUEUED or not seconds:
        return None
    end = run.created + timedelta(seconds=seconds)
    draft.wake_at(max(end, draft.now))
    return end


def cleanup_state(draft: Draft, run: RunView) -> str:
    """Return what a clean-up waits for, or that it runs."""
    if run.state is RunState.QUEUED:
        return f"a queue holds the clean-up: {queue_message(draft, run)}"
    stuck = waiting(draft.seen.pods_of(run.run), draft.seen.complaints)
    return stuck[1] if stuck is not None else "the clean-up runs"
