"""What trainers on preference pairs have in common, as a mixin over TRL's DPOTrainer and RewardTrainer."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.training.stage_trainer import StageTrainer


class PairTrainer(StageTrainer):
    """Mixin: every pair of an optimizer step counts alike.

    TRL's losses are means over the pairs of one forward pass, and transformers and DDP average those means. Where
    passes differ in size (the last step of an epoch, pairs that the workers cannot share evenly), pairs of small passes
    would count for more.
    """

    def count(self, batches: list[dict[str, Any]]) -> None:
        """Count what is in batches that are trained on, and the step's pairs on all workers."""
        super().count(batches)
        pairs = torch.tensor([sum(map(_pairs, batches))], device=self.accelerator.device)
        passes = len(batches) * self.accelerator.num_processes
        self.stage.pairs_share = passes / max(int(self.accelerator.gather(pairs).sum()), 1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; in training, in proportion to the batch's pairs."""
        pairs = _pairs(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * (pairs * self.stage.pairs_share) if self.model.training else loss


def _pairs(batch: dict[str, Any]) -> int:
    """Pairs in a batch, whose rows are the chosen answers and then the rejected ones."""
    return len(batch["input_ids"]) // 2
