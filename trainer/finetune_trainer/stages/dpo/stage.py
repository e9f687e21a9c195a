"""Direct preference optimization (arXiv 2305.18290), full or with LoRA or QLoRA adapters."""

from __future__ import annotations

from typing import Any

import trl

from finetune_api.stages import DpoSpec
from finetune_trainer.data import PreferenceCollator
from finetune_trainer.training.adapter_model import adapted_model, adapted_trainer, starting_model
from finetune_trainer.training.arguments import loss_arguments, training_arguments
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.held_out import Sums, preference_loss, preference_sums
from finetune_trainer.training.preference_trainer import PreferenceTrainer


class DpoTrainer(PreferenceTrainer, trl.DPOTrainer):
    """TRL's DPOTrainer on pairs with later user turns masked, which TRL's own collator would include in the loss."""

    def measure(self, model: Any, inputs: dict[str, Any]) -> Sums:
        """Return TRL's metrics of held-out pairs as sums, without the router's auxiliary loss of MoE models.

        The loss types `aot` and `aot_unpaired` compare the pairs of a batch by rank, so they depend on the batch size.
        """
        loss, means = self.held_out_loss(model, inputs)
        means.pop("num_tokens", None)
        kinds = zip(self.loss_types, self.loss_weights, strict=True)
        sft_weight = sum(weight for kind, weight in kinds if kind == "sft")
        return preference_sums(loss, means, inputs["completion_mask"], sft_weight)

    def finish_means(self, means: dict[str, float]) -> dict[str, float]:
        """Return the final metrics; see `training.held_out.preference_loss`."""
        return preference_loss(means)


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of a `dpo` stage."""
    spec = context.spec
    assert isinstance(spec, DpoSpec)
    args = trl.DPOConfig(**training_arguments(context), **_dpo_arguments(spec), max_length=None)
    adapted = adapted_model(context)
    collator = PreferenceCollator(context.tokenizer.pad_token_id)
    reference = _reference(context, spec)
    return adapted_trainer(DpoTrainer, context, *adapted, args, ref_model=reference, data_collator=collator)


def _dpo_arguments(spec: DpoSpec) -> dict[str, Any]:
    return {**loss_arguments(spec), "precompute_ref_log_probs": spec.reference == "precomputed"}


def _reference(context: StageContext, spec: DpoSpec) -> Any:
    """Return a second model as the reference, or None if it is precomputed or is the policy without its adapter."""
    wants_model = spec.reference == "model" or (spec.reference == "auto" and spec.lora is None)
    return starting_model(context) if wants_model else None
