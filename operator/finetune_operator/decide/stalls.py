"""Stalls of an attempt: the condition, the attempt's end, and the nodes that the next attempt should not use (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_api.exit_codes import ExitCode
from finetune_api.report import AttemptReport
from finetune_operator.core.conditions import Reason, Type
from finetune_operator.core.report_validation import clean
from finetune_operator.core.snapshot import PodView, RunView

if TYPE_CHECKING:
    from finetune_operator.decide.status_builder import Draft

Json = dict[str, Any]


def follow_stall(draft: Draft, run: RunView) -> None:
    """Set the condition `Stalled` from the active attempt's report, and to False once training continues."""
    report = draft.seen.report
    if report is None:
        return
    if report.stalled:
        draft.set(Type.STALLED, "True", Reason.STALLED, stall_message(report, draft.seen.pods_of(run.run)))
    elif draft.holds(Type.STALLED) and report.step is not None and report.exit_code is None:
        draft.set(Type.STALLED, "False", Reason.TRAINING, f"training continues in attempt {run.run}")


def stall_message(report: AttemptReport, pods: tuple[PodView, ...]) -> str:
    """Return the driver's message about a stall, with the pod on the node that is behind."""
    pod = next((pod for pod in pods if pod.node is not None and pod.node == report.node), None)
    return clean(report.stalled or "") + (f" (pod {pod.name})" if pod is not None else "")


def stall_ending(report: AttemptReport | None, pods: tuple[PodView, ...]) -> tuple[str, PodView | None] | None:
    """Return the message, and the pod that is behind, of an attempt that a stall has ended; None for any other end.

    A reported node is ignored if none of the run's pods is on it.
    """
    if report is None or not report.stalled or report.exit_code != ExitCode.FAILED:
        return None
    pod = next((pod for pod in pods if pod.node is not None and pod.node == report.node), None)
    return stall_message(report, pods), pod


def stalled_nodes(status: Json) -> tuple[str, ...]:
    """Return the nodes that the next attempt should not prefer: a worker there stalled the last attempt.

    Only the attempt that ended last counts, and only as a preference: a worker may hang on a healthy node, and a job
    that has stalled on each node must still find one.
    """
    ended = [record for record in status.get("attempts") or [] if "endTime" in record][-1:]
    return tuple(record["stalledNode"] for record in ended if "stalledNode" in record)


def node_preference(status: Json) -> str:
    """Return a message about the nodes that an attempt avoids if it can; empty if there are none."""
    nodes = stalled_nodes(status)
    return f"prefers other nodes than {', '.join(nodes)}, where a worker stalled the last attempt" if nodes else ""


def slow_node(report: AttemptReport) -> str:
    """Return a message about a node that is slower than the others; empty if there is none."""
    step = report.step
    if step is None or step.slow_node is None or step.slow_factor is None:
        return ""
    return f"node {clean(step.slow_node)} is slow: its workers take {step.slow_factor:.1f} times as long as the others"
