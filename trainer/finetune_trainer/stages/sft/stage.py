"""Supervised fine-tuning, full or with LoRA or QLoRA adapters."""

from __future__ import annotations

from typing import Any

import trl

from finetune_api.stages import SftSpec
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_trainer import StageTrainer
from finetune_trainer.training.supervised_batches import supervised_batches


class SftTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on rows with prepared labels."""


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of an `sft` stage."""
    spec = context.spec
    assert isinstance(spec, SftSpec)
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading.
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return adapted_trainer(SftTrainer, context, *adapted_model(context), args, **supervised_batches(context, spec))
