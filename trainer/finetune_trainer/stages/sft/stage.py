"""Supervised fine-tuning, in full or by (quantized) low-rank adapters."""

from __future__ import annotations

from typing import Any

import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_api.stages import SftSpec, SupervisedSpec
from finetune_trainer.data import PackedCollator
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.packing_check import PackingCheck
from finetune_trainer.training.stage_trainer import StageTrainer


class SftTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer on rows whose labels are prepared."""


def make_trainer(context: StageContext) -> Any:
    """The trainer of an `sft` stage."""
    spec = context.spec
    assert isinstance(spec, SftSpec)
    # The arguments come first: with ZeRO-3 they divide the model among the workers while it loads.
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return adapted_trainer(SftTrainer, context, *adapted_model(context), args, **supervised_batches(context, spec))


def supervised_batches(context: StageContext, spec: SupervisedSpec) -> dict[str, Any]:
    """Return the arguments of a trainer that make its batches of dialogues: packed, and checked, or padded."""
    pad = context.tokenizer.pad_token_id
    if not spec.packing:
        return {"data_collator": DataCollatorForLanguageModeling(pad_token_id=pad)}
    assert spec.max_length is not None
    collator = PackedCollator(pad, spec.max_length)
    return {"data_collator": collator, "callbacks": [PackingCheck(context, collator)]}
