"""A mixin for trainers on preference pairs, over TRL's DPOTrainer and RewardTrainer."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.training.stage_trainer import StageTrainer


class PairTrainer(StageTrainer):
    """A mixin that weights every pair of an optimizer step equally.

    TRL's losses are means over the pairs of one forward pass, and transformers and DDP average those means. If passes
    differ in size (in the last step of an epoch, or if pairs are not divisible among the workers), pairs of small
    passes would have a larger weight.
    """

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count the tokens and rows of a step's batches, and the step's pairs on all workers."""
        super().count(batches)
        pairs = torch.tensor([sum(map(_pairs, batches))], device=self.accelerator.device)
        passes = len(batches) * self.accelerator.num_processes
        self.stage.pairs_share = passes / max(int(self.accelerator.gather(pairs).sum()), 1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, in training weighted by the number of pairs in the batch."""
        pairs = _pairs(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (pairs * self.stage.pairs_share) if self.model.training else loss


def _pairs(batch: dict[str, Any]) -> int:
    """Return the number of pairs in a batch, whose rows are the chosen answers followed by the rejected ones."""
    return len(batch["input_ids"]) // 2
