"""Batches of dialogues, for the stages that train on them (`sft`, `esft`)."""

from __future__ import annotations

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_api.stages import SupervisedSpec
from finetune_trainer.data import PackedCollator
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.packing_check import PackingCheck


def supervised_batches(context: StageContext, spec: SupervisedSpec) -> dict[str, Any]:
    """Return the trainer's keyword arguments that make batches of dialogues: packed and checked, or padded."""
    pad = context.tokenizer.pad_token_id
    if not spec.packing:
        return {"data_collator": DataCollatorForLanguageModeling(pad_token_id=pad)}
    assert spec.max_length is not None
    collator = PackedCollator(pad, spec.max_length)
    return {"data_collator": collator, "callbacks": [PackingCheck(context, collator)]}
