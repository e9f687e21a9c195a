"""What a stall of an attempt means for the job: its condition, the attempt's end, the next one's nodes (pure)."""

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
    """Set the condition `Stalled` from what the attempt on its way says, and take it back once training goes on."""
    report = draft.seen.report
    if report is None:
        return
    if report.stalled:
        draft.set(Type.STALLED, "True", Reason.STALLED, stall_words(report, draft.seen.pods_of(run.run)))
    elif draft.holds(Type.STALLED) and report.step is not None and report.exit_code is None:
        draft.set(Type.STALLED, "False", Reason.TRAINING, f"training goes on in attempt {run.run}")


def stall_words(report: AttemptReport, pods: tuple[PodView, ...]) -> str:
    """Return what the driver says of a stall, with the pod on the node that is behind."""
    pod = next((pod for pod in pods if pod.node is not None and pod.node == report.node), None)
    return clean(report.stalled or "") + (f" (pod {pod.name})" if pod is not None else "")


def stall_ending(report: AttemptReport | None, pods: tuple[PodView, ...]) -> tuple[str, PodView | None] | None:
    """Return the message and the pod that is behind of an attempt that a stall has ended; None for any other end.

    A node without one of the run's pods is not believed, as for a broken GPU.
    """
    if report is None or not report.stalled or report.exit_code != ExitCode.FAILED:
        return None
    pod = next((pod for pod in pods if pod.node is not None and pod.node == report.node), None)
    return stall_words(report, pods), pod


def disliked(status: Json) -> tuple[str, ...]:
    """Return the node that the next attempt should rather not run on: a worker there stalled the attempt before.

    Only the attempt that ended last counts, and only as a preference. A worker may hang without any fault of its node,
    and a job of which each node has stalled once must find one.
    """
    ended = [record for record in status.get("attempts") or [] if "endTime" in record][-1:]
    return tuple(record["stalledNode"] for record in ended if "stalledNode" in record)


def told_away(status: Json) -> str:
    """Return what to say of the nodes that an attempt was kept away from; empty where there are none."""
    nodes = disliked(status)
    return f"prefers other nodes than {', '.join(nodes)}, where a worker stalled the last attempt" if nodes else ""


def slow_node(report: AttemptReport) -> str:
    """Return what to say of a node that is slower than the others; empty where none is."""
    step = report.step
    if step is None or step.slow_node is None or step.slow_factor is None:
        return ""
    return f"node {clean(step.slow_node)} is slow: its workers take {step.slow_factor:.1f} times as long as the others"
