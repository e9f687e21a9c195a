"""Reward modeling on preference pairs (arXiv 2203.02155), full or with LoRA or QLoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
import trl

from finetune_api.stages import RewardSpec
from finetune_trainer.data import RewardCollator
from finetune_trainer.model.reward_score import read_at_last_token
from finetune_trainer.training.adapter_model import adapted_trainer, fresh_adapter
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.held_out import Sums, reward_sums, without_gathering
from finetune_trainer.training.preference_trainer import PreferenceTrainer


class RewardTrainer(PreferenceTrainer, trl.RewardTrainer):
    """TRL's RewardTrainer on prepared pairs."""

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return the loss and the ranking metrics of held-out pairs as sums."""
        with without_gathering(self):
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self._metrics["eval"].clear()
        return reward_sums(loss, torch.stack(outputs.logits.float().squeeze(-1).chunk(2), dim=1))


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of a `reward` stage."""
    spec = context.spec
    assert isinstance(spec, RewardSpec)
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading.
    args = trl.RewardConfig(
        **training_arguments(context), center_rewards_coefficient=spec.center_rewards_coefficient, max_length=None
    )
    collator = RewardCollator(context.tokenizer.pad_token_id)
    model, peft_config = fresh_adapter(context)
    read_at_last_token(model)
    return adapted_trainer(RewardTrainer, context, model, peft_config, args, data_collator=collator)
