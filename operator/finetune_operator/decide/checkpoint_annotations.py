"""Annotations with the last checkpoint on the main object of a run and on its pods (pure).

They show schedulers and users what a preemption would cost (kueue#477, volcano#5999): all steps since the checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_operator.core.names import CHECKPOINT_ANNOTATIONS, mark_of
from finetune_operator.core.snapshot import PodView, RunView
from finetune_operator.decide.actions import MarkCheckpoint

if TYPE_CHECKING:
    from finetune_operator.decide.status_builder import Draft

Json = dict[str, Any]


def mark_checkpoint(draft: Draft, run: RunView) -> None:
    """Annotate the objects of a training run that lack the annotations of the newest checkpoint."""
    checkpoint = draft.status.get("lastCheckpoint")
    if not checkpoint or run.deleting:
        return
    wanted = annotations_of(checkpoint)
    own = [pod for pod in draft.seen.pods_of(run.run) if pod.runs]
    pods = tuple(pod.name for pod in own if lacks(pod, wanted))
    if pods or lacks(run, wanted):
        draft.do(MarkCheckpoint(run.run, run.engine, wanted, lacks(run, wanted), pods))


def annotations_of(checkpoint: Json) -> dict[str, str]:
    """Return `status.lastCheckpoint` as annotations; older trainers report no time."""
    found = {"stage": checkpoint["stage"], "step": checkpoint["step"], "time": checkpoint.get("savedAt")}
    return {CHECKPOINT_ANNOTATIONS[name]: str(value) for name, value in found.items() if value is not None}


def lacks(view: RunView | PodView, wanted: dict[str, str]) -> bool:
    """Whether an object has no annotations of this checkpoint."""
    return view.checkpoint != mark_of(wanted)
