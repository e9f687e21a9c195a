"""Supervised fine-tuning, in full or by (quantized) low-rank adapters."""

from __future__ import annotations

from typing import Any

import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_api.stages import SftSpec, SupervisedSpec
from finetune_trainer.data import PackedCollator
from finetune_trainer.stages.adapted import adapted_model, adapted_trainer
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_trainer import StageTrainer


class SftTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on rows whose labels are prepared."""


def make_trainer(context: StageContext) -> Any:
    """The trainer of an `sft` stage."""
    spec = context.spec
    assert isinstance(spec, SftSpec)
    # The arguments come first: with ZeRO-3 they divide the model among the workers while it loads.
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    collator = supervised_collator(context, spec)
    return adapted_trainer(SftTrainer, context, *adapted_model(context), args, data_collator=collator)


def supervised_collator(context: StageContext, spec: SupervisedSpec) -> Any:
    """Batches of dialogues, packed or padded."""
    pad = context.tokenizer.pad_token_id
    if spec.packing:
        assert spec.max_length is not None
        return PackedCollator(pad, spec.max_length)
    return DataCollatorForLanguageModeling(pad_token_id=pad)
