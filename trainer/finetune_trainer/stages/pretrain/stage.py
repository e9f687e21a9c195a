"""Causal or masked language modeling on blocks of plain text, from scratch or from a pretrained model."""

from __future__ import annotations

from typing import Any

import transformers
import trl
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune_api.stages import PretrainSpec
from finetune_trainer.model.load import load_model
from finetune_trainer.stages.pretrain.masking import MaskingCollator
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.callbacks import EpochCallback
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.held_out import Sums, masked_sums
from finetune_trainer.training.stage_trainer import StageTrainer


class CausalTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's SFTTrainer, whose loss does not materialize the full logits, on blocks with loss on every token."""


class MaskedTrainer(StageTrainer, transformers.Trainer):
    """transformers' Trainer on masked blocks."""

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return the loss of the masked tokens of held-out blocks as sums."""
        return masked_sums(model, inputs)


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of a `pretrain` stage."""
    spec = context.spec
    assert isinstance(spec, PretrainSpec)
    return _masked(context, spec) if spec.objective == "masked" else _causal(context, spec)


def _causal(context: StageContext, spec: PretrainSpec) -> Any:
    # Create the arguments before the model: with ZeRO-3 they enable sharded loading.
    args = trl.SFTConfig(**training_arguments(context), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return CausalTrainer(
        model=_model(context, spec),
        args=args,
        train_dataset=context.sample,
        eval_dataset=context.data.eval,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=context.tokenizer.pad_token_id),
        processing_class=context.tokenizer,
    )


def _masked(context: StageContext, spec: PretrainSpec) -> Any:
    args = transformers.TrainingArguments(**training_arguments(context))
    collator = MaskingCollator(context.tokenizer, spec.mlm_probability, spec.seed)
    return MaskedTrainer(
        model=_model(context, spec),
        args=args,
        train_dataset=context.sample,
        eval_dataset=_masked_once(context.data.eval, collator),
        data_collator=collator,
        processing_class=context.tokenizer,
        callbacks=[EpochCallback(collator)],
    )


def _masked_once(rows: Dataset | None, collator: MaskingCollator) -> Dataset | None:
    """Mask the held-out rows once, so that all evaluations use the same masks."""
    return None if rows is None else rows.map(collator.mask_rows, batched=True, batch_size=64)


def _model(context: StageContext, spec: PretrainSpec) -> transformers.PreTrainedModel:
    return load_model(
        context.source,
        context.job_model,
        context.precision,
        task=spec.task,
        seed=spec.seed,
        device=context.load_device,
    )
