"""Direct preference optimisation (arXiv 2305.18290), in full or by (quantized) low-rank adapters."""

from __future__ import annotations

from typing import Any

import trl

from finetune_api.stages import DpoSpec, PreferenceLoss
from finetune_trainer.data import PreferenceCollator
from finetune_trainer.stages.adapted import adapted_model, adapted_trainer, starting_model
from finetune_trainer.training.arguments import training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_trainer import StageTrainer


class DpoTrainer(StageTrainer, trl.DPOTrainer):
    """TRL's DPOTrainer on pairs whose user turns after the prompt are masked; TRL's own collator counts them."""


def make_trainer(context: StageContext) -> Any:
    """The trainer of a `dpo` stage."""
    spec = context.spec
    assert isinstance(spec, DpoSpec)
    args = trl.DPOConfig(**training_arguments(context), **_dpo_arguments(spec), max_length=None)
    adapted = adapted_model(context)
    collator = PreferenceCollator(context.tokenizer.pad_token_id)
    reference = _reference(context, spec)
    return adapted_trainer(DpoTrainer, context, *adapted, args, ref_model=reference, data_collator=collator)


def loss_arguments(spec: PreferenceLoss) -> dict[str, Any]:
    """The loss's fields as keyword arguments for TRL's `DPOConfig`."""
    return {
        "beta": spec.beta,
        "loss_type": spec.loss_type,
        "loss_weights": spec.loss_weights,
        "label_smoothing": spec.label_smoothing,
    }


def _dpo_arguments(spec: DpoSpec) -> dict[str, Any]:
    return {**loss_arguments(spec), "precompute_ref_log_probs": spec.reference == "precomputed"}


def _reference(context: StageContext, spec: DpoSpec) -> Any:
    """A second model, where the reference isn't the policy without its adapter or precomputed."""
    wants_model = spec.reference == "model" or (spec.reference == "auto" and spec.lora is None)
    return starting_model(context) if wants_model else None
