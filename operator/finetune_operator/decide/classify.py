"""Why a run ended: from exit codes, container states, pod conditions and the engine's own words (pure)."""

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
"""After its grace period a pod is gone within seconds, unless its node is."""
MESSAGE_LIMIT = 2048
_GIVEN_UP = "DeletionByTaintManager"
_NODE_LOST = ("NodeLost", "NodeShutdown", "Shutdown", "Terminated", _GIVEN_UP, "DeletionByPodGC")
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
_FROM_OUTSIDE = (137, 143)
"""Of a process that these end, the last line of its log is what it was doing, and not why it has ended."""


@dataclass(frozen=True)
class Ending:
    """How a run ended, for people (`message`, `pod`, `node`) and for the next decision."""

    reason: Reason
    message: str
    retryable: bool
    counts: bool = True
    """Whether it uses up one of `backoffLimit`: an outsider's doing doesn't."""
    pod: str | None = None
    node: str | None = None
    exit_code: int | None = None
    traceback: str = ""
    """The last lines of what the driver said, where that is more than the message."""
    container: str = ""
    """The container that is to blame, where it isn't the trainer's."""
    advice: str = ""
    """What to do about a device fault (`finetune_api.device_faults`)."""
    faulty_node: bool = False
    """Whether a GPU of `node` is broken: the next attempt keeps away from that node."""
    stalled: bool = False
    """Whether a worker on `node` has stalled: the next attempt prefers other nodes."""


def classify(run: RunView, pods: tuple[PodView, ...], report: AttemptReport | None) -> Ending:
    """The ending of a failed run. The first rule that fits wins: the driver's own word, then what Kubernetes saw."""
    said = _said(pods, report)
    logged = "" if said else _driver_text(pods)
    text = (said.message or "") if said else logged or run.message
    code = _exit_code(run, pods, said)
    own = "" if logged and code in _FROM_OUTSIDE else _last_line(text)
    unknown = Ending(Reason.UNKNOWN, own or _wordless(code), True, True, *_place(pods[:1]), code)
    ending = next(iter(_endings(run, pods, text, code, device_ending(text, pods, said), said)), unknown)
    more = len(text.strip().splitlines()) > 1 and ending.message != _clip(text)
    return replace(ending, traceback=_clip(text) if more else "")


def lost(pods: Iterable[PodView], now: datetime) -> Ending | datetime | None:
    """Whether a node has gone without a word: a pod on it should have ended long ago, and nobody says that it has; or
    Kubernetes has given the node up and deletes its pods. One that only is tainted keeps its pods ready until they end.

    Returns:
        How its run ended then; or the time at which a pod that is being deleted will count as lost.
    """
    going = [pod for pod in pods if pod.grace_over and not pod.over]
    silent = next((pod for pod in going if pod.disruption == _GIVEN_UP and not pod.ready), None)
    if silent is not None:
        message = f"pod {silent.name}: its node does not answer"
        return Ending(Reason.NODE_LOST, message, True, False, silent.name, silent.node)
    first = min(going, key=lambda pod: pod.grace_over or now, default=None)
    if first is None or first.grace_over is None:
        return None
    due = first.grace_over + timedelta(seconds=LOST_SECONDS)
    if due > now:
        return due
    message = f"pod {first.name} was to end by {stamp(first.grace_over)}, and its node does not say that it has"
    return Ending(Reason.NODE_LOST, message, True, False, first.name, first.node)


def waiting(pods: Iterable[PodView], complaints: Iterable[Complaint] = ()) -> tuple[Reason, str] | None:
    """What holds up a run that has not begun, most telling first."""
    pods = tuple(pods)
    for reasons, reason in ((_PULL, Reason.IMAGE_PULL), (_CONFIG, Reason.POD_CONFIG)):
        for pod in pods:
            if pod.waiting and pod.waiting[0] in reasons:
                return reason, _clip(f"pod {pod.name}: {pod.waiting[0]}: {pod.waiting[1]}")
    for pod in pods:
        if pod.unschedulable is not None and pod.node is None:
            return Reason.UNSCHEDULABLE, _clip(pod.unschedulable)
    for said in complaints:
        known = Reason.POD_CONFIG if said.reason in _MOUNT else Reason.FORBIDDEN if said.pods_refused else None
        return known or Reason.STARTING, _clip(f"{said.reason}: {said.message}")
    return None


def _endings(
    run: RunView,
    pods: tuple[PodView, ...],
    text: str,
    code: int | None,
    device: DeviceEnding | None,
    said: AttemptReport | None,
) -> Iterable[Ending]:
    driver = next((pod for pod in pods if pod.index == 0), None)
    place = _place([driver] if driver else [])
    if code == ExitCode.USER_ERROR:
        yield Ending(Reason.USER_ERROR, _clip(text or "the job, its data or its settings are wrong"), False, True,
                     *place, code)  # fmt: skip
    yield from _refused_by_a_node(pods)
    if code == ExitCode.GATE_NOT_PASSED:
        yield Ending(Reason.GATE_NOT_PASSED, _clip(text or "an evaluation missed its bound"), False, True, *place, code)
    yield from _lost_pods(pods)
    yield from _deleted_pods(pods)
    if run.disrupted:  # the engine says so, for runs whose pods are gone
        yield Ending(Reason.EVICTED, _clip(run.message), True, False, *place, code)
    yield from _killed_for_memory(pods)
    if (stall := stall_ending(said, pods)) is not None:
        message, pod = stall
        yield Ending(Reason.STALLED, _clip(message), True, True, *_place([pod] if pod else []), code, stalled=True)
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


def _refused_by_a_node(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    """A node beside the driver's that found itself unfit for the job, by the checks of `finetune doctor`: it is set up
    wrong, or a GPU of it does not work. The driver itself was only told to stop."""
    for pod in pods:
        said = termination_report(pod) if pod.index else None
        broken = device_ending(said.message or "", pods, said) if said is not None else None
        if broken is not None and broken.node_is_faulty:
            yield _of_device(broken, (pod.name, pod.node), pod.exit_code)
        elif said is not None and said.exit_code == ExitCode.USER_ERROR:
            message = f"pod {pod.name} on node {pod.node}: {said.message or 'its node does not suit the job'}"
            yield Ending(Reason.USER_ERROR, _clip(message), False, True, pod.name, pod.node, pod.exit_code)


def _lost_pods(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for marks, reason in ((_NODE_LOST, Reason.NODE_LOST), (_EVICTED, Reason.EVICTED)):
        for pod in pods:
            why = next((mark for mark in (pod.disruption, pod.reason) if mark in marks), None)
            if why is not None:
                message = f"pod {pod.name}: {why}" + (f": {pod.message}" if pod.message else "")
                yield Ending(reason, _clip(message), True, False, pod.name, pod.node, pod.exit_code)


def _deleted_pods(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for pod in pods:
        if pod.forced:
            message = f"pod {pod.name} was deleted while it ran"
            yield Ending(Reason.POD_DELETED, message, True, False, pod.name, pod.node)


def _killed_for_memory(pods: tuple[PodView, ...]) -> Iterable[Ending]:
    for pod in pods:
        if pod.terminated == "OOMKilled":
            who = f"container {pod.failed_container} of pod" if pod.failed_container else "pod"
            yield Ending(Reason.OOM_KILLED, f"{who} {pod.name} used more memory than its limit", False, True, pod.name,
                         pod.node, pod.exit_code, container=pod.failed_container)  # fmt: skip


def termination_report(pod: PodView) -> AttemptReport | None:
    """The report in a pod's termination message; None where there is none."""
    return None if pod.failed_container else read_report(pod.termination_message)


def _said(pods: tuple[PodView, ...], report: AttemptReport | None) -> AttemptReport | None:
    written = (termination_report(pod) for pod in pods if pod.index == 0)
    return next(filter(None, written), None) or (report if report and report.exit_code is not None else None)


def _driver_text(pods: tuple[PodView, ...]) -> str:
    driver = next((pod for pod in pods if pod.index == 0), None)
    if driver is None or not driver.failed_container:
        return driver.termination_message if driver else ""
    how = f"container {driver.failed_container} ended with exit code {driver.exit_code}"
    return f"{driver.termination_message}\n{how}".strip()


def _exit_code(run: RunView, pods: tuple[PodView, ...], said: AttemptReport | None) -> int | None:
    """The driver's; another container's codes mean what they like."""
    if said is not None and said.exit_code is not None:
        return said.exit_code
    driver = next((pod.exit_code for pod in pods if pod.index == 0 and not pod.failed_container), None)
    return driver if driver is not None else run.exit_code


def _wordless(code: int | None) -> str:
    how = f" (exit code {code}{f', {_SIGNALS[code]}' if code in _SIGNALS else ''})" if code is not None else ""
    return f"the trainer ended without a word{how}"


def _place(pods: Iterable[PodView]) -> tuple[str | None, str | None]:
    return next(((pod.name, pod.node) for pod in pods), (None, None))


def _last_line(text: str) -> str:
    """A traceback's last line is the error itself; one that is torn off below some code has an earlier one, or none."""
    lines = [line for line in text.splitlines() if line.strip() and not RAY_FIELD.match(line)]
    if lines and not _WORD.search(lines[-1]):
        lines = [line for line in lines if _ERROR.match(line)] or [line for line in lines if _WORD.search(line)]
    return _clip(lines[-1].strip() if lines else "")


def _line_of(pattern: re.Pattern[str], text: str) -> str:
    """The last line that says so."""
    return _clip(next((line for line in reversed(text.splitlines()) if pattern.search(line)), text).strip())


def _clip(text: str) -> str:
    """The end of a long text: a traceback's last lines tell most. What kubelet took from a log may hold secrets."""
    text = clean(redact(text, {}))
    return text if len(text) <= MESSAGE_LIMIT else "…" + text[-MESSAGE_LIMIT + 1 :]
