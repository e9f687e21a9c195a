"""The decision step that runs preflight: it checks a job before any GPU is claimed (pure)."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.core.conditions import Reason, Type, moment
from finetune_operator.core.names import PREFLIGHT_RUN
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import PodView, RunState, RunView
from finetune_operator.decide.actions import DeleteRun, StartRun
from finetune_operator.decide.classify import Ending, classify, termination_report, waiting
from finetune_operator.decide.oom_advice import with_preflight_advice
from finetune_operator.decide.queueing import queue_limit, queue_message, refuse
from finetune_operator.decide.status_builder import Draft


def preflight(draft: Draft) -> bool:
    """Start preflight, wait for it, and take its result."""
    if draft.holds(Type.PLANNED):
        return False
    if not draft.kubernetes.preflight:
        draft.set(Type.PLANNED, "True", Reason.PREFLIGHT_SKIPPED)
        return False
    run = draft.seen.run(PREFLIGHT_RUN)
    if run is None and draft.status.get("attempts"):  # it passed and was deleted while no operator ran
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
    passed = any(pod.phase == "Succeeded" for pod in pods)  # the main object's status follows a second later
    if passed or run.state is RunState.SUCCEEDED:
        draft.learn(next(filter(None, map(termination_report, pods)), None))
        draft.set(Type.PLANNED, "True", Reason.PREFLIGHT_PASSED, draft.plan_summary())
        return False
    if run.state is RunState.FAILED:
        ending = with_preflight_advice(classify(run, pods, None), draft.settings.preflight_memory)
        return _preflight_failed(draft, ending)
    if run.state is RunState.QUEUED:
        return _held(draft, run)
    return _starting_or_running(draft, run, pods)


def _starting_or_running(draft: Draft, run: RunView, pods: tuple[PodView, ...]) -> bool:
    """Report what preflight waits for, and fail the job if its pods cannot start in time."""
    stuck = waiting(pods, draft.seen.complaints)
    draft.set(Type.PLANNED, "Unknown", *(stuck or (Reason.PREFLIGHT_RUNNING, "")))
    limit = patience(stuck[0], draft.settings) if stuck is not None else 0
    if stuck is None or not limit:
        return True
    attempts = draft.policy.backoff_limit + 1  # preflight waits as long as all attempts together would
    end = begun(draft, run) + timedelta(seconds=limit * attempts)
    if end > draft.now:
        draft.wake_at(end)
        return True
    draft.do(DeleteRun(run.run, run.engine))
    return _preflight_failed(draft, Ending(*stuck, retryable=False))


def _held(draft: Draft, run: RunView) -> bool:
    """Report that a queue holds preflight, and fail the job after `helper_queue_seconds`."""
    message = queue_message(draft, run)
    draft.set(Type.PLANNED, "Unknown", Reason.QUEUED, message)
    end = queue_limit(draft, run)
    if end is None or end > draft.now:
        return True
    draft.do(DeleteRun(run.run, run.engine))
    message = f"the queue held preflight for {draft.settings.helper_queue_seconds} s: {message}"
    return _preflight_failed(draft, Ending(Reason.QUEUED, message, retryable=False))


def _preflight_failed(draft: Draft, ending: Ending) -> bool:
    draft.failure(ending, PREFLIGHT_RUN)
    draft.set(Type.PLANNED, "False", Reason.PREFLIGHT_FAILED, ending.message)
    reason = ending.reason if ending.reason is Reason.USER_ERROR else Reason.PREFLIGHT_FAILED
    return draft.fail(reason, ending.message)


def patience(reason: Reason, settings: Settings) -> int:
    """Return for how many seconds a run may wait for this reason; 0 means no limit, since a quota may be raised."""
    if reason is Reason.UNSCHEDULABLE:
        return settings.start_seconds
    return settings.image_pull_seconds if reason in (Reason.IMAGE_PULL, Reason.POD_CONFIG) else 0


def begun(draft: Draft, run: RunView) -> datetime:
    """Return since when a run has its pods and may start: its time in a queue does not count."""
    created = [moment(pod.created) for pod in draft.seen.pods_of(run.run) if pod.created and not pod.gone]
    admitted = draft.admitted() if run.run > 0 else None
    return max(run.created, min(created, default=run.created), admitted or run.created)
