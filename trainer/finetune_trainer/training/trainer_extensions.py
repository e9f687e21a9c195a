"""What a stage adds to its trainer, all of it in the trainer's attribute `stage`.

An attribute of our own could overwrite one of transformers' or TRL's trainer: TRL's GRPOTrainer reads `self.tools`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from finetune_trainer.esft.routing import RoutingCounter
    from finetune_trainer.training.batches import Feed
    from finetune_trainer.training.held_out import Means
    from finetune_trainer.training.loss_guard import LossGuard
    from finetune_trainer.training.stage_io import StageTools
    from finetune_trainer.training.step_times import StepTimes


@dataclass
class StageParts:
    """What every stage adds; stages with more to add derive from it."""

    feed: Feed = field(init=False)
    """Which rows are trained on at which step."""
    weight_decays: list[float] = field(init=False)
    """Weight decay of each of the optimizer's groups."""
    held_out: Means = field(init=False)
    """What the evaluation in progress has measured so far."""
    tokens: torch.Tensor | int = 0
    """Tokens this worker has trained on since they were last taken; a tensor, so that counting needs no sync."""
    samples: int = 0
    """Rows this worker has trained on since they were last taken."""
    rows_share: float = 1.0
    """In preference stages: forward passes of all workers in this step, divided by the step's rows."""
    routing: RoutingCounter | None = None
    """Counts what the routers choose while training; None in a dense model."""
    tools: StageTools | None = None
    """Storage, the other workers and the driver, for a trainer that also works between its steps."""
    times: StepTimes | None = None
    """Measures this worker's own part of each step."""
    guard: LossGuard | None = None
    """Judges the losses and gradients of each step."""
    keeps_last: bool = True
    """Whether the state after the last step is saved as a checkpoint."""
    paused: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Stops the training clock while it is entered."""
