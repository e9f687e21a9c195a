"""The step of a decision that has a job checked before any GPU is claimed (pure)."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.actions import DeleteRun, StartRun
from finetune_operator.advice import with_preflight_advice
from finetune_operator.classify import Ending, classify, termination_report, waiting
from finetune_operator.conditions import Reason, Type, moment
from finetune_operator.draft import Draft
from finetune_operator.names import PREFLIGHT_RUN
from finetune_operator.observed import RunState, RunView
from finetune_operator.queued import queue_limit, queue_message, refuse
from finetune_operator.settings import Settings


def preflight(draft: Draft) -> bool:
    """Start the check, wait for it, and take over what it says."""
    if draft.holds(Type.PLANNED):
        return False
    if not draft.kubernetes.preflight:
        draft.set(Type.PLANNED, "True", Reason.PREFLIGHT_SKIPPED)
        return False
    run = draft.seen.run(PREFLIGHT_RUN)
    if run is None and draft.status.get("attempts"):  # it passed, was cleaned up, and nobody was there to write it down
        draft.set(Type.PLANNED, "True", Reason.PREFLIGHT_PASSED)
        return False
    if run is None or run.deleting:
        draft.set(Type.PLANNED, "Unknown", Reason.PREFLIGHT_RUNNING)
        draft.do(StartRun(PREFLIGHT_RUN))
        return True
    if run.elsewhere:
        draft.set(Type.PLANNED, "False", Reason.REJECTED)
        return refuse(draft, run)
    pods = draft.seen.pods_of(PREFLIGHT_RUN)
    passed = any(pod.phase == "Succeeded" for pod in pods)  # its Job says so a second later
    if passed or run.state is RunState.SUCCEEDED:
        draft.learn(next(filter(None, map(termination_report, pods)), None))
        draft.set(Type.PLANNED, "True", Reason.PREFLIGHT_PASSED, draft.plan_words())
        return False
    if run.state is RunState.FAILED:
        ending = with_preflight_advice(classify(run, pods, None), draft.settings.preflight_memory)
        return _preflight_failed(draft, ending)
    if run.state is RunState.QUEUED:
        return _held(draft, run)
    stuck = waiting(pods, draft.seen.complaints)
    draft.set(Type.PLANNED, "Unknown", *(stuck or (Reason.PREFLIGHT_RUNNING, "")))
    limit = patience(stuck[0], draft.settings) if stuck is not None else 0
    if stuck is None or not limit:
        return True
    end = begun(draft, run) + timedelta(
        seconds=limit * (draft.policy.backoff_limit + 1)
    )  # as long as attempts would try
    if end > draft.now:
        draft.wake_at(end)
        return True
    draft.do(DeleteRun(run.run, run.engine))
    return _preflight_failed(draft, Ending(*stuck, retryable=False))


def _held(draft: Draft, run: RunView) -> bool:
    """A queue holds the check: say so, and give up after a while."""
    message = queue_message(draft, run)
    draft.set(Type.PLANNED, "Unknown", Reason.QUEUED, message)
    end = queue_limit(draft, run)
    if end is None or end > draft.now:
        return True
    draft.do(DeleteRun(run.run, run.engine))
    message = f"its queue held the preflight for {draft.settings.helper_queue_seconds} s: {message}"
    return _preflight_failed(draft, Ending(Reason.QUEUED, message, retryable=False))


def _preflight_failed(draft: Draft, ending: Ending) -> bool:
    draft.failure(ending, PREFLIGHT_RUN)
    draft.set(Type.PLANNED, "False", Reason.PREFLIGHT_FAILED, ending.message)
    reason = ending.reason if ending.reason is Reason.USER_ERROR else Reason.PREFLIGHT_FAILED
    return draft.fail(reason, ending.message)


def patience(reason: Reason, settings: Settings) -> int:
    """Seconds that a run may be held up by that; 0 is for ever: quotas are lifted, and networks come back."""
    if reason is Reason.UNSCHEDULABLE:
        return settings.start_seconds
    return settings.image_pull_seconds if reason in (Reason.IMAGE_PULL, Reason.POD_CONFIG) else 0


def begun(draft: Draft, run: RunView) -> datetime:
    """Return since when a run may begin, and has its pods: its time in a queue does not count."""
    created = [moment(pod.created) for pod in draft.seen.pods_of(run.run) if pod.created and not pod.gone]
    admitted = draft.admitted() if run.run > 0 else None
    return max(run.created, min(created, default=run.created), admitted or run.created)
