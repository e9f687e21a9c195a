"""State that a stage adds to its trainer, in the trainer's single attribute `stage`.

Further attributes could overwrite those of transformers' or TRL's trainers: TRL's GRPOTrainer reads `self.tools`.
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
    from finetune_trainer.training.stage_io import StageIO
    from finetune_trainer.training.step_times import StepTimes


@dataclass
class TrainerExtensions:
    """State that every stage adds to its trainer. Stages that add more derive from it."""

    feed: Feed = field(init=False)
    """The rows to train on at each step."""
    weight_decays: list[float] = field(init=False)
    """Weight decay of each parameter group of the optimizer."""
    held_out: Means = field(init=False)
    """Metrics of the evaluation in progress."""
    tokens: torch.Tensor | int = 0
    """Tokens that this worker has trained on since the count was last read; a tensor, so that counting needs no
    device synchronisation."""
    samples: int = 0
    """Rows that this worker has trained on since the count was last read."""
    rows_share: float = 1.0
    """In preference stages: forward passes of all workers in this step, divided by the step's rows."""
    routing: RoutingCounter | None = None
    """Counts the experts that the routers choose during training; None in a dense model."""
    io: StageIO | None = None
    """Storage, collectives and channel, for a trainer that also works between its steps."""
    times: StepTimes | None = None
    """Measures the time that each step takes on this worker."""
    guard: LossGuard | None = None
    """Checks the loss and the gradients of each step."""
    keeps_last: bool = True
    """Whether the state after the last step is saved as a checkpoint."""
    paused: Callable[[], AbstractContextManager[Any]] = nullcontext
    """A context manager that stops the training clock."""
