"""The decision about a job: its new status and what to do, from a snapshot (pure).

The steps run in order until one of them returns True.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from finetune_operator.core.conditions import Reason, Type, moment, stamp
from finetune_operator.core.names import CLEANUP_RUN
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import ENDED, Observed, PodView, RunState, RunView
from finetune_operator.decide import attempts
from finetune_operator.decide.actions import AbandonRun, Decision, DeleteJob, DeleteRun, HoldJob, StartRun
from finetune_operator.decide.classify import classify, lost, termination_report
from finetune_operator.decide.oom_advice import with_advice
from finetune_operator.decide.preflight import preflight
from finetune_operator.decide.queueing import cleanup_state, queue_limit, queue_message
from finetune_operator.decide.running_attempt import follow
from finetune_operator.decide.spec_check import spec_faults
from finetune_operator.decide.status_builder import Draft
from finetune_operator.decide.suspension import deadline, suspend


def decide(seen: Observed, settings: Settings, now: datetime) -> Decision:
    """Return the new status, the actions, the events and the time of the next reconcile."""
    draft = Draft(seen, settings, now)
    for step in _LAST_STEPS if draft.going() else _STEPS:
        if step(draft):
            break
    return draft.decision()


def _over(draft: Draft) -> bool:
    """Delete what still runs of a finished job, and the job itself after `ttlSecondsAfterFinished`."""
    if not (draft.holds(Type.SUCCEEDED) or draft.holds(Type.FAILED)):
        return False
    for run in draft.seen.runs:
        if run.owner == draft.seen.uid and run.state not in ENDED and not run.deleting:
            draft.do(DeleteRun(run.run, run.engine))
    _ttl(draft)
    return True


def _ttl(draft: Draft) -> None:
    ttl = draft.policy.ttl_seconds_after_finished
    ended = draft.status.get("completionTime")
    if ttl is None or ended is None:
        return
    expiry = moment(ended) + timedelta(seconds=ttl)
    if expiry <= draft.now:
        draft.do(DeleteJob())
    else:
        draft.wake_at(expiry)


def _invalid(draft: Draft) -> bool:
    """Check the spec when it has changed: CEL rules cannot check all of a pod template."""
    if draft.holds(Type.VALIDATED) and not draft.changed():
        return False
    fault = spec_faults(draft.seen.body, draft.settings, draft.seen.engines)
    if fault is not None:
        draft.set(Type.VALIDATED, "False", fault.reason, fault.message)
        draft.status.pop("failure", None)
        return draft.fail(fault.reason, fault.message)
    draft.set(Type.VALIDATED, "True", Reason.VALID)
    return False


def _hold(draft: Draft) -> bool:
    """Add the finalizer to a job whose storage is emptied after its deletion."""
    if draft.spec["storage"].get("deletionPolicy") == "Delete" and not draft.held():
        draft.do(HoldJob(True))
    return False


def _empty(draft: Draft) -> bool:
    """Stop the runs of a deleted job, empty its storage, then remove the finalizer."""
    if not draft.held():
        return True
    runs = [run for run in draft.seen.runs if run.owner == draft.seen.uid and run.run > 0]
    for run in runs:
        if not run.deleting:
            draft.do(DeleteRun(run.run, run.engine))
    cleanup = draft.seen.run(CLEANUP_RUN)
    if runs:
        names = ", ".join(run.name for run in runs)
        draft.set(Type.RUNNING, "False", Reason.CLEANING_UP, f"waiting for the pods of {names} to end")
    elif cleanup is None:
        draft.do(StartRun(CLEANUP_RUN))
    elif cleanup.state in ENDED:
        _let_go(draft, cleanup.message if cleanup.state is RunState.FAILED else "")
    else:
        _await_cleanup(draft, cleanup)
    return True


def _await_cleanup(draft: Draft, cleanup: RunView) -> None:
    """Report what the clean-up waits for; remove the finalizer if a queue has held it for too long."""
    draft.set(Type.RUNNING, "False", Reason.CLEANING_UP, f"emptying the storage: {cleanup_state(draft, cleanup)}")
    end = queue_limit(draft, cleanup)
    if cleanup.elsewhere:
        draft.do(DeleteRun(cleanup.run, cleanup.engine))
        _let_go(draft, f"its clean-up was sent to another cluster by {cleanup.elsewhere}")
    elif end is not None and end <= draft.now:
        draft.do(DeleteRun(cleanup.run, cleanup.engine))
        _let_go(draft, f"the queue held the clean-up for too long: {queue_message(draft, cleanup)}")


def _let_go(draft: Draft, error: str) -> None:
    if error:
        message = f"the storage could not be emptied, its files are kept: {error}"
        draft.event("Warning", Reason.CLEANUP_FAILED.value, message)
    draft.do(HoldJob(False))


def _record(draft: Draft) -> bool:
    """Record the ended attempts in the status before the other steps use them."""
    for run in sorted(draft.seen.runs, key=lambda run: run.run):
        if run.run < 1 or run.owner != draft.seen.uid:
            continue
        record = draft.attempt_seen(run)
        if run.orphaned and run.state is RunState.FAILED and not run.deleting:
            draft.do(DeleteRun(run.run, run.engine))
        if run.state is RunState.FAILED and "endTime" not in record:
            pods = _of_its_end(run, draft.seen.pods_of(run.run))
            draft.learn(next(filter(None, map(termination_report, pods[:1])), None))
            ending = with_advice(classify(run, pods, draft.seen.report), draft.seen.body, draft.status)
            draft.attempt_ended(run, ending)
    draft.learn(draft.seen.report)  # the report is the newest attempt's, so it comes after the older ones' last reports
    draft.attempts_gone()
    _give_up_lost(draft)
    return False


def _of_its_end(run: RunView, pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    """Return the pods that show how a run ended, without a driver pod that the engine created after that."""
    return tuple(pod for pod in pods if pod.ended or pod.index) if run.orphaned else pods


def _give_up_lost(draft: Draft) -> None:
    """End the runs of lost nodes, which never end by themselves, so that the next attempt can start.

    If the node comes back with the run still alive, storage rejects its checkpoints (`storage/fencing.py`).
    """
    for run in draft.seen.runs:
        if run.owner != draft.seen.uid or run.state is RunState.SUCCEEDED:
            continue
        found = lost(draft.seen.pods_of(run.run), draft.now)
        if isinstance(found, datetime):
            draft.wake_at(found)
        elif found is not None:
            if run.run > 0:
                draft.attempt_ended(run, found)
            draft.do(AbandonRun(run.run, run.engine))


def _refused(draft: Draft) -> bool:
    """Fail a job whose objects the API server rejects; wait if it only forbids them for now."""
    trouble = draft.seen.trouble
    if trouble is None:
        return False
    if trouble.reason is Reason.REJECTED:
        draft.status.pop("failure", None)
        return draft.fail(trouble.reason, trouble.message)
    if trouble.again <= draft.now:
        return False
    draft.set(Type.RUNNING, "False", trouble.reason, trouble.message)
    draft.wake_at(trouble.again)
    return True


def _succeeded(draft: Draft) -> bool:
    run = next((run for run in draft.seen.runs if run.run > 0 and run.state is RunState.SUCCEEDED), None)
    if run is None or run.owner != draft.seen.uid:
        return False
    draft.learn(next(filter(None, map(termination_report, draft.seen.pods_of(run.run)[:1])), None))
    draft.attempt_succeeded(run)
    draft.succeed()
    _ttl(draft)
    return True


def _start(draft: Draft) -> bool:
    """If no attempt is active, fail the job, wait for the backoff delay, or start the next attempt."""
    if draft.active() is not None:
        return False
    last = attempts.last(draft.status)
    limit = draft.policy.backoff_limit
    if last is not None and not last["retryable"]:
        return draft.fail(Reason(last["reason"]), last["message"])
    if again := attempts.repeated(draft.status):
        message = f"the same error ended the last two attempts at the same step: {again}"
        return draft.fail(Reason.REPEATED_ERROR, message)
    failed = attempts.failures(draft.status)
    if failed > limit:
        assert last is not None
        message = f"{failed} attempts without progress (backoffLimit {limit}): {last['message']}"
        return draft.fail(Reason(last["reason"]), message)
    ready = attempts.next_start(draft.status, draft.settings)
    if ready is not None and ready > draft.now:
        assert last is not None
        draft.set(Type.RUNNING, "False", Reason.BACK_OFF, f"next attempt at {stamp(ready)}, after {last['reason']}")
        draft.wake_at(ready)
        return True
    if draft.seen.engines.missing:
        draft.set(Type.RUNNING, "False", Reason.ENGINE_MISSING, draft.seen.engines.missing)
        draft.wake_at(draft.now + timedelta(seconds=60))
        return True
    if not draft.queued():
        draft.set(Type.ADMITTED, "True", Reason.NOT_QUEUED)
    draft.start_attempt()
    return True


_STEPS: tuple[Callable[[Draft], bool], ...] = (
    _over,
    _invalid,
    _hold,
    _record,
    _succeeded,
    _refused,
    deadline,
    suspend,
    preflight,
    _start,
    follow,
)
_LAST_STEPS: tuple[Callable[[Draft], bool], ...] = (_record, _empty)
