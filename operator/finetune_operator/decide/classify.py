"""Why a run ended, from exit codes, container states, pod conditions and the engine's messages (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_api.exit_codes import ExitCode
from finetune_api.ray_messages import RAY_FIELD
from finetune_api.redact import redact
from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason, stamp
from finetune_operator.core.report_validation import clean, read_report
from finetune_operator.core.snapshot import Complaint, PodView, RunView
from finetune_operator.decide.device_failures import DeviceEnding, device_ending
from finetune_operator.decide.stalls import stall_ending

LOST_SECONDS = 30
"""Time after its grace period at which a pod counts as lost: it ends within seconds unless its node is lost."""
MESSAGE_LIMIT = 2048
_NODE_TAINTED = "DeletionByTaintManager"
_NODE_LOST = ("NodeLost", "NodeShutdown", "Shutdown", "Terminated", _NODE_TAINTED, "DeletionByPodGC")
_EVICTED = ("Evicted", "Preempted", "Preempting", "PreemptionByScheduler", "EvictionByEvictionAPI",
            "TerminationByKubelet", "OutOfcpu", "OutOfmemory", "OutOfpods", "UnexpectedAdmissionError")  # fmt: skip
_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_MOUNT = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
_RENDEZVOUS = re.compile(
    r"NCCL (error|timeout|WARN)|nccl(System|Remote|Internal|UnhandledCuda)Error|WorkNCCL|ProcessGroup(NCCL|Gloo)|"
    r"Watchdog caught collective operation timeout|gloo.*(connect|timeout|Connection)|"
    r"Dist(Network|Store|Backend)Error|rendezvous|failed to connect to (the )?(head|GCS)|RpcError|"
    r"Unable to connect to GCS",
    re.IGNORECASE,
)
_WORD, _ERROR = re.compile(r"\w"), re.compile(r"[\w.]+(Error|Exception)\b")
_SIGNALS = {137: "SIGKILL", 143: "SIGTERM", 139: "SIGSEGV", 134: "SIGABRT"}
_KILLED = (137, 143)
"""Exit codes of a process that a signal ended: the last line of its log is not the reason of its end."""


@dataclass(frozen=True)
class Ending:
    """How a run ended: what the status reports, and what the next attempt depends on."""

    reason: Reason
    message: str
    retryable: bool
    counts: bool = True
    """Whether it counts towards `backoffLimit`; an end with an outside cause does not."""
    pod: str | None = None
    node: str | None = None
    exit_code: int | None = None
    traceback: str = ""
    """The last lines of the driver's output, if that is more than the message."""
    container: str = ""
    """The container that failed, if it is not the trainer's."""
    advice: str = ""
    """The remedy for a device fault (`finetune_api.device_faults`)."""
    faulty_node: bool = False
    """Whether a GPU of `node` is faulty: the next attempt must not use that node."""
    stalled: bool = False
    """Whether a worker on `node` has stalled: the next attempt prefers other nodes."""


def classify(run: RunView, pods: tuple[PodView, ...], report: AttemptReport | None) -> Ending:
    """Return how a failed run ended, by the first rule that applies: the driver's report, then the pods' states."""
    final = _final_report(pods, report)
    log = "" if final else _driver_text(pods)
    text = (final.message or "") if final else log or run.message
    code = _exit_code(run, pods, final)
    own = "" if log and code in _KILLED else _last_line(text)
    unknown = Ending(Reason.UNKNOWN, own or _no_message(code), True, True, *_pod_and_node(pods[:1]), code)
    ending = next(iter(_endings(run, pods, text, code, device_ending(text, pods, final), final)), unknown)
    more = len(text.strip().splitlines()) > 1 and ending.message != _clip(text)
    return replace(ending, traceback=_clip(text) if more else "")


def lost(pods: Iterable[PodView], now: datetime) -> Ending | datetime | None:
    """Return the end of a run whose node is lost, if it is.

    A node is lost when Kubernetes deletes its pods because of its `unreachable` taint, or when a pod that is being
    deleted has not ended `LOST_SECONDS` after its grace period. The pods of a node with another taint stay ready until
    they end.

    Returns:
        How the run ended; or the time at which a pod that is being deleted will count as lost; or None.
    """
    deleting = [pod for pod in pods if pod.grace_over and not pod.over]
    unreachable = next((pod for pod in deleting if pod.disruption == _NODE_TAINTED and not pod.ready), None)
    if unreachable is not None:
        message = f"pod {unreachable.name}: its node does not answer"
        return Ending(Reason.NODE_LOST, message, True, False, unreachable.name, unreachable.node)
    first = min(deleting, key=lambda pod: pod.grace_over or now, default=None)
    if first is None or first.grace_over is None:
        return None
    due = first.grace_over + timedelta(seconds=LOST_SECONDS)
    if due > now:
        return due
    message = (
        f"pod {first.name} has not ended by {stamp(first.grace_over)}, the end of its grace period: its node is lost"
    )
    return Ending(Reason.NODE_LOST, message, True, False, first.name, first.node)


def waiting(pods: Iterable[PodView], complaints: Iterable[Complaint] = ()) -> tuple[Reason, str] | None:
    """Return why a run does not start, or None; a container's state comes before scheduling and warning events."""
    pods = tuple(pods)
    for reasons, reason in ((_PULL, Reason.IMAGE_PULL), (_CONFIG, Reason.POD_CONFIG)):
        for pod in pods:
            if pod.waiting and pod.waiting[0] in reasons:
                return reason, _clip(f"pod {pod.name}: {pod.waiting[0]}: {pod.waiting[1]}")
    for pod in pods:
        if pod.unschedulable is not None and pod.node is None:
            return Reason.UNSCHEDULABLE, _clip(pod.unschedulable)
    for warning in complaints:
        known = Reason.POD_CONFIG if warning.reason in _MOUNT else None
        known = Reason.FORBIDDEN if warning.pods_refused else known
        return known or Reason.STARTING, _clip(f"{warning.reason}: {warning.message}")
    return None


def _endings(
    run: RunView,
    pods: tuple[PodView, ...],
    text: str,
    code: int | None,
    device: DeviceEnding | None,
    report: AttemptReport | None,
) -> Iterable[Ending]:
    driver = next((pod for pod in pods if pod.index == 0), None)
    place = _pod_and_node([driver] if driver else [])
    if code == ExitCode.USER_ERROR:
        yield Ending(Reason.USER_ERROR, _clip(text or "the job, its data or its settings are wrong"), False, True,
                     *place, code)  # fmt: skip
    yield from _unfit_nodes(pods)
    if code == ExitCode.GATE_NOT_PASSED:
        yield Ending(Reason.GATE_NOT_PASSED, _clip(text or "an evaluation missed its bound"), False, True, *place, code)
    yield from _lost_pods(pods)
    yield from _deleted_pods(pods)
    if run.disrupted:  # the engine says so, for runs whose pods are gone
        yield Ending(Reason.EVICTED, _clip(run.message), True, False, *place, code)
    yield from _killed_for_memory(pods)
    if (stall := stall_ending(report, pods)) is not None:
        message, pod = stall
        yield Ending(
            Reason.STALLED, _clip(message), True, True, *_pod_and_node([pod] if pod else []), code, stalled=True
        )
    if device is not None:
        yield _of_device(device, place, code)
    if code == ExitCode.OUT_OF_MEMORY:
        yield Ending(Reason.OOM_KILLED, _last_line(text) or "out of memory", False, True, *place, code)
    if code == ExitCode.INTERRUPTED:
        message = _last_line(text) or "stopped, with a checkpoint"
        yield Ending(Reason.INTERRUPTED, message, True, False, *place, code)
    stuck = waiting(pods)
    if stuck is not None:
        yield Ending(stuck[0], stuck[1], True, True, *place, code)
    if _RENDEZVOUS.search(text):
        yield Ending(Reason.RENDEZVOUS, _line_of(_RENDEZVOUS, text), True, True, *place, code)


def _of_device(device: DeviceEnding, place: tuple[str | None, str | None], code: int | None) -> Ending:
    pod = device.pod
    where = place if pod is None else (pod.name, pod.node)
    return Ending(device.reason, _clip(device.line), device.retryable, True, *where, code, advice=device.advice,
                  faulty_node=device.node_is_faulty)  # fmt: skip


def _unfit_nodes(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    """Yield ends caused by nodes other than the driver's that failed the checks of `finetune doctor`.

    Their setup is wrong or a GPU is faulty; the driver's own end is only a consequence.
    """
    for pod in pods:
        report = termination_report(pod) if pod.index else None
        fault = device_ending(report.message or "", pods, report) if report is not None else None
        if fault is not None and fault.node_is_faulty:
            yield _of_device(fault, (pod.name, pod.node), pod.exit_code)
        elif report is not None and report.exit_code == ExitCode.USER_ERROR:
            message = f"pod {pod.name} on node {pod.node}: {report.message or 'its node failed the checks of the job'}"
            yield Ending(Reason.USER_ERROR, _clip(message), False, True, pod.name, pod.node, pod.exit_code)


def _lost_pods(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for causes, reason in ((_NODE_LOST, Reason.NODE_LOST), (_EVICTED, Reason.EVICTED)):
        for pod in pods:
            cause = next((item for item in (pod.disruption, pod.reason) if item in causes), None)
            if cause is not None:
                message = f"pod {pod.name}: {cause}" + (f": {pod.message}" if pod.message else "")
                yield Ending(reason, _clip(message), True, False, pod.name, pod.node, pod.exit_code)


def _deleted_pods(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for pod in pods:
        if pod.forced:
            message = f"pod {pod.name} was deleted while it ran"
            yield Ending(Reason.POD_DELETED, message, True, False, pod.name, pod.node)


def _killed_for_memory(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for pod in pods:
        if pod.terminated == "OOMKilled":
            subject = f"container {pod.failed_container} of pod" if pod.failed_container else "pod"
            message = f"{subject} {pod.name} used more memory than its limit"
            yield Ending(Reason.OOM_KILLED, message, False, True, pod.name, pod.node, pod.exit_code,
                         container=pod.failed_container)  # fmt: skip


def termination_report(pod: PodView) -> AttemptReport | None:
    """Return the report in a pod's termination message, or None if it has no valid one."""
    return None if pod.failed_container else read_report(pod.termination_message)


def _final_report(pods: tuple[PodView, ...], report: AttemptReport | None) -> AttemptReport | None:
    """Return the driver's last report: of its termination message, or else the polled one if it has an exit code."""
    written = (termination_report(pod) for pod in pods if pod.index == 0)
    return next(filter(None, written), None) or (report if report and report.exit_code is not None else None)


def _driver_text(pods: tuple[PodView, ...]) -> str:
    driver = next((pod for pod in pods if pod.index == 0), None)
    if driver is None or not driver.failed_container:
        return driver.termination_message if driver else ""
    end = f"container {driver.failed_container} ended with exit code {driver.exit_code}"
    return f"{driver.termination_message}\n{end}".strip()


def _exit_code(run: RunView, pods: tuple[PodView, ...], report: AttemptReport | None) -> int | None:
    """Return the driver's exit code; those of other containers have other meanings."""
    if report is not None and report.exit_code is not None:
        return report.exit_code
    driver = next((pod.exit_code for pod in pods if pod.index == 0 and not pod.failed_container), None)
    return driver if driver is not None else run.exit_code


def _no_message(code: int | None) -> str:
    end = f" (exit code {code}{f', {_SIGNALS[code]}' if code in _SIGNALS else ''})" if code is not None else ""
    return f"the trainer exited without an error message{end}"


def _pod_and_node(pods: Iterable[PodView]) -> tuple[str | None, str | None]:
    return next(((pod.name, pod.node) for pod in pods), (None, None))


def _last_line(text: str) -> str:
    """Return the last line, which is a traceback's error; of a truncated traceback, the last line with an error."""
    lines = [line for line in text.splitlines() if line.strip() and not RAY_FIELD.match(line)]
    if lines and not _WORD.search(lines[-1]):
        lines = [line for line in lines if _ERROR.match(line)] or [line for line in lines if _WORD.search(line)]
    return _clip(lines[-1].strip() if lines else "")


def _line_of(pattern: re.Pattern[str], text: str) -> str:
    """Return the last line that matches."""
    return _clip(next((line for line in reversed(text.splitlines()) if pattern.search(line)), text).strip())


def _clip(text: str) -> str:
    """Return the last `MESSAGE_LIMIT` characters without secrets, which a container's log may contain."""
    text = clean(redact(text, {}))
    return text if len(text) <= MESSAGE_LIMIT else "..." + text[-MESSAGE_LIMIT + 3 :]
