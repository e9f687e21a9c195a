"""The end of an attempt by a device fault, such as a faulty GPU or a missing compiler (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.device_faults import FaultKind, Found, Retry, device_fault
from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason
from finetune_operator.core.snapshot import PodView

_REASONS = {
    FaultKind.GPU: Reason.GPU_FAULT,
    FaultKind.TOOLCHAIN: Reason.USER_ERROR,
    FaultKind.DRIVER: Reason.USER_ERROR,
    FaultKind.ARCHITECTURE: Reason.USER_ERROR,
    FaultKind.DEVICE_ASSERT: Reason.DEVICE_ASSERT,
    FaultKind.DEVICE_MEMORY: Reason.DEVICE_OOM,
    FaultKind.SHARED_MEMORY: Reason.SHARED_MEMORY,
    FaultKind.PINNED_MEMORY: Reason.USER_ERROR,
    FaultKind.HOST_MEMORY: Reason.OOM_KILLED,
    FaultKind.ILLEGAL_ACCESS: Reason.ILLEGAL_ACCESS,
    FaultKind.NCCL_TIMEOUT: Reason.RENDEZVOUS,
    FaultKind.NCCL_SYSTEM: Reason.RENDEZVOUS,
}
"""One reason per kind of fault. Both kinds of NCCL faults are a lost connection between workers."""
_RETRIED = (Retry.AGAIN, Retry.ELSEWHERE)


@dataclass(frozen=True)
class DeviceEnding:
    """An attempt's end by a device fault."""

    reason: Reason
    line: str
    """The line that names the fault."""
    retryable: bool
    advice: str
    pod: PodView | None
    """The pod on the node of the fault, if known."""
    node_is_faulty: bool
    """Whether the next attempt must not use that pod's node."""


def device_ending(text: str, pods: tuple[PodView, ...], report: AttemptReport | None) -> DeviceEnding | None:
    """Return the device fault in a text, or None.

    Args:
        text: The message of the driver's report, or the end of its log.
        pods: The pods of the run.
        report: The driver's report, which may name the node of the fault.
    """
    found = device_fault(text)
    return None if found is None else _ending(found, pods, report)


def _ending(found: Found, pods: tuple[PodView, ...], report: AttemptReport | None) -> DeviceEnding:
    fault, pod = found.fault, _pod_of_fault(pods, report)
    faulty = fault.retry is Retry.ELSEWHERE and pod is not None and pod.node is not None
    return DeviceEnding(
        _REASONS[fault.kind], found.line, fault.retry in _RETRIED, fault.advice, pod, node_is_faulty=faulty
    )


def _pod_of_fault(pods: tuple[PodView, ...], report: AttemptReport | None) -> PodView | None:
    """Return the pod on the node that the report names, or the pod of a run with one node.

    A node without a pod of the run is ignored: the report comes from a pod that runs user code.
    """
    if report is not None and report.node is not None:
        return next((pod for pod in pods if pod.node == report.node), None)
    return pods[0] if len({pod.node for pod in pods}) == 1 else None
