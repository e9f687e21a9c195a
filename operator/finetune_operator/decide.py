"""What to do about a job, from what is seen of it (pure).

One ordered list of steps; the first that has an answer wins.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from finetune_operator import attempts
from finetune_operator.actions import AbandonRun, Decision, DeleteJob, DeleteRun, HoldJob, StartRun
from finetune_operator.advice import with_advice
from finetune_operator.checking import preflight
from finetune_operator.classify import classify, lost, termination_report
from finetune_operator.conditions import Reason, Type, moment, stamp
from finetune_operator.draft import Draft
from finetune_operator.follow import follow
from finetune_operator.names import CLEANUP_RUN
from finetune_operator.observed import ENDED, Observed, PodView, RunState, RunView
from finetune_operator.queued import cleanup_words, queue_limit, queue_message
from finetune_operator.settings import Settings
from finetune_operator.spec_check import spec_faults
from finetune_operator.stopping import deadline, suspend


def decide(seen: Observed, settings: Settings, now: datetime) -> Decision:
    """The status as it should read, what to do, and when to look again."""
    draft = Draft(seen, settings, now)
    for step in _LAST_STEPS if draft.going() else _STEPS:
        if step(draft):
            break
    return draft.decision()


def _over(draft: Draft) -> bool:
    """A finished job: stop what still runs, and delete the job when its time is up."""
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
    """Checked again only where the spec has changed: of what is below a pod template, CEL cannot see everything."""
    if draft.holds(Type.VALIDATED) and not draft.changed():
        return False
    fault = spec_faults(draft.seen.body, draft.settings)
    if fault is not None:
        draft.set(Type.VALIDATED, "False", fault.reason, fault.message)
        draft.status.pop("failure", None)
        return draft.fail(fault.reason, fault.message)
    draft.set(Type.VALIDATED, "True", Reason.VALID)
    return False


def _hold(draft: Draft) -> bool:
    """A job that empties its storage in the end must not go before that."""
    if draft.spec["storage"].get("deletionPolicy") == "Delete" and not draft.held():
        draft.do(HoldJob(True))
    return False


def _empty(draft: Draft) -> bool:
    """A job that is to go: stop its runs, empty its storage, let it go."""
    if not draft.held():
        return True
    runs = [run for run in draft.seen.runs if run.owner == draft.seen.uid and run.run > 0]
    for run in runs:
        if not run.deleting:
            draft.do(DeleteRun(run.run, run.engine))
    cleanup = draft.seen.run(CLEANUP_RUN)
    if runs:
        names = ", ".join(run.name for run in runs)
        draft.set(Type.RUNNING, "False", Reason.CLEANING_UP, f"waits for the pods of {names} to end")
    elif cleanup is None:
        draft.do(StartRun(CLEANUP_RUN))
    elif cleanup.state in ENDED:
        _let_go(draft, cleanup.message if cleanup.state is RunState.FAILED else "")
    else:
        _await_cleanup(draft, cleanup)
    return True


def _await_cleanup(draft: Draft, cleanup: RunView) -> None:
    """Say what the clean-up waits for, and let the job go once a queue has held it for too long."""
    draft.set(Type.RUNNING, "False", Reason.CLEANING_UP, f"empties its storage: {cleanup_words(draft, cleanup)}")
    end = queue_limit(draft, cleanup)
    if cleanup.elsewhere:
        draft.do(DeleteRun(cleanup.run, cleanup.engine))
        _let_go(draft, f"its clean-up was sent to another cluster by {cleanup.elsewhere}")
    elif end is not None and end <= draft.now:
        draft.do(DeleteRun(cleanup.run, cleanup.engine))
        _let_go(draft, f"its clean-up was held by its queue for too long: {queue_message(draft, cleanup)}")


def _let_go(draft: Draft, trouble: str) -> None:
    if trouble:
        message = f"its storage could not be emptied, what is there stays: {trouble}"
        draft.event("Warning", Reason.CLEANUP_FAILED.value, message)
    draft.do(HoldJob(False))


def _record(draft: Draft) -> bool:
    """Write the ended attempts into the status before anything is decided from them."""
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
    draft.learn(draft.seen.report)  # the newest attempt's, so after what older ones have said in the end
    draft.attempts_gone()
    _give_up_lost(draft)
    return False


def _of_its_end(run: RunView, pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    """Return the pods that tell how a run ended: without a driver's pod that the engine has made since."""
    return tuple(pod for pod in pods if pod.ended or pod.index) if run.orphaned else pods


def _give_up_lost(draft: Draft) -> None:
    """A run on a node that is gone for good never ends by itself: it is over, and the next one may start.

    Should the node come back with the run still alive there, storage refuses its checkpoints (`checkpoint/hold.py`).
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
    """The API server did not take what was rendered: for good, or for now."""
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
    """No attempt is on its way: give up, wait, or start the next one."""
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
    if draft.seen.engine_missing:
        message = "kubernetes.engine is kuberay, but this cluster has no ray.io/v1 RayJob: install KubeRay, or use job"
        draft.set(Type.RUNNING, "False", Reason.ENGINE_MISSING, message)
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
