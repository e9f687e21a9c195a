"""A reward model from preference pairs (arXiv 2203.02155), in full or by (quantized) low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
import trl
from transformers import EvalPrediction

from finetune_api.stages import RewardSpec
from finetune_trainer.data import RewardCollator
from finetune_trainer.stages.adapted import adapted_trainer, fresh_adapter
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_trainer import StageTrainer


class RewardTrainer(StageTrainer, trl.RewardTrainer):
    """TRL's RewardTrainer, whose accuracy is of each held-out pair; TRL's is a mean of the batches' means."""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """transformers' hook: loss, rewards [B, 2] of chosen and rejected, and labels [B] that nothing reads."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self._metrics["eval"].clear()
        rewards = torch.stack(outputs.logits.float().squeeze(-1).chunk(2), dim=1)
        return loss.detach(), rewards, torch.zeros(len(rewards), device=rewards.device)


def make_trainer(context: StageContext) -> Any:
    """The trainer of a `reward` stage."""
    spec = context.spec
    assert isinstance(spec, RewardSpec)
    # The arguments come first: with ZeRO-3 they divide the model among the workers while it loads.
    args = trl.RewardConfig(
        **training_arguments(context), center_rewards_coefficient=spec.center_rewards_coefficient, max_length=None
    )
    more = {"data_collator": RewardCollator(context.tokenizer.pad_token_id), "compute_metrics": _measure}
    return adapted_trainer(RewardTrainer, context, *fresh_adapter(context), args, **more)


def _measure(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the pairs that are ranked rightly, and by how much on average."""
    chosen, rejected = prediction.predictions.T
    margins = chosen - rejected
    return {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "mean_reward": float(prediction.predictions.mean()),
    }
