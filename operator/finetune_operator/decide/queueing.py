"""Steps of a decision about a run that a queue (Kueue) holds, or has sent elsewhere (pure)."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.core.conditions import Reason, Type
from finetune_operator.core.snapshot import RunState, RunView
from finetune_operator.decide.actions import DeleteRun
from finetune_operator.decide.classify import waiting
from finetune_operator.decide.status_builder import Draft


def held(draft: Draft, run: RunView) -> bool:
    """Say what the queue says. The time that it takes counts for no deadline: that begins again with the admission, as
    it does after a suspension, and as Kubernetes has it for Jobs."""
    draft.set(Type.ADMITTED, "False", Reason.QUEUED, queue_message(draft, run))
    going = any(not pod.over for pod in draft.seen.pods_of(run.run))
    draft.set(Type.RUNNING, "False", Reason.QUEUED, "its pods save a checkpoint and end" if going else "")
    draft.status.pop("startTime", None)
    return True


def refuse(draft: Draft, run: RunView) -> bool:
    """End a job whose queue sends it to another cluster: its pods would never be seen here."""
    message = (
        f"{run.name} is managed by {run.elsewhere}, which runs it in another cluster: this operator does not follow it "
        "there. Choose a queue of this cluster"
    )
    draft.do(DeleteRun(run.run, run.engine))
    draft.stop_reason(run.run, Reason.REJECTED, message)
    draft.status.pop("failure", None)
    return draft.fail(Reason.REJECTED, message)


def queue_message(draft: Draft, run: RunView) -> str:
    """Return Kueue's own words where it has some, else the engine's."""
    return next((said.message for said in draft.seen.complaints), "") or run.message


def queue_limit(draft: Draft, run: RunView) -> datetime | None:
    """Return until when a queue may hold a preflight or a clean-up; None where none holds it, or for ever."""
    seconds = draft.settings.helper_queue_seconds
    if run.state is not RunState.QUEUED or not seconds:
        return None
    end = run.created + timedelta(seconds=seconds)
    draft.wake_at(max(end, draft.now))
    return end


def cleanup_words(draft: Draft, run: RunView) -> str:
    """Return what a clean-up waits for."""
    if run.state is RunState.QUEUED:
        return f"its queue holds the clean-up: {queue_message(draft, run)}"
    stuck = waiting(draft.seen.pods_of(run.run), draft.seen.complaints)
    return stuck[1] if stuck is not None else "the clean-up runs"
