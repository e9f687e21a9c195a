"""A mixin for trainers on preferences, over TRL's DPOTrainer, RewardTrainer and KTOTrainer."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.training.held_out import without_gathering
from finetune_trainer.training.stage_trainer import StageTrainer


class PreferenceTrainer(StageTrainer):
    """A mixin that weights every row of an optimizer step equally.

    TRL's losses are means over the rows of one forward pass, and transformers and DDP average those means. If passes
    differ in size (in the last step of an epoch, or if rows are not divisible among the workers), rows of small
    passes would have a larger weight.
    """

    sequences_per_row = 2
    """Sequences of one row in a batch: a pair is two, the chosen answers first."""

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count the tokens and rows of a step's batches, and the step's rows on all workers."""
        super().count(batches)
        rows = torch.tensor([sum(map(self._row_count, batches))], device=self.accelerator.device)
        passes = len(batches) * self.accelerator.num_processes
        self.stage.rows_share = passes / max(int(self.accelerator.gather(rows).sum()), 1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, in training weighted by the number of rows in the batch."""
        rows = self._row_count(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (rows * self.stage.rows_share) if self.model.training else loss

    def held_out_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        """Return the loss of a held-out batch and TRL's metrics of it, without the router's loss of MoE models."""
        trl_trainer: Any = self  # the trainers of TRL define the flag and the metrics
        balanced: bool = trl_trainer.aux_loss_enabled
        self.aux_loss_enabled = False
        try:
            with without_gathering(self):
                loss = self.compute_loss(model, inputs)
        finally:
            self.aux_loss_enabled = balanced
        means = {name: values[-1] for name, values in trl_trainer._metrics["eval"].items()}
        trl_trainer._metrics["eval"].clear()
        return loss, means

    def _row_count(self, batch: dict[str, Any]) -> int:
        return len(batch["input_ids"]) // self.sequences_per_row
