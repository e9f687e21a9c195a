"""Estimate the weights that an `esft` stage trains, and compare its memory with full fine-tuning and LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

from transformers import PreTrainedModel

from finetune_api.problems import Problem
from finetune_api.stages import EsftSpec
from finetune_trainer.errors import UserError
from finetune_trainer.esft.families import ExpertLayer, expert_layers
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.trainable import expert_size, shared_names, trained_whole
from finetune_trainer.model.composite import language_names
from finetune_trainer.model.expert_selection import load_expert_config
from finetune_trainer.plan.memory import Workload, estimate
from finetune_trainer.plan.model_size import AdapterSize, ModelSize
from finetune_trainer.plan.states import trainable

COARSE = 16
"""With fewer experts per layer than this, even one selected expert is a large part of the model."""


@dataclass(frozen=True)
class ExpertPlan:
    """Trained weights of an `esft` stage."""

    tuned: int
    """Number of trained weights; an upper bound if token scores are yet to select the experts."""
    active: int
    """Number of trained weights that an average token is multiplied by."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Alternative:
    """Memory of another training method for the same stage."""

    method: str
    trainable: int
    optimizer: int
    """Bytes of AdamW's states per worker."""
    total: int
    """Total bytes per worker."""


def expert_plan(spec: EsftSpec, model: PreTrainedModel, where: str, base_dir: str) -> ExpertPlan:
    """Return the plan of a stage's trained weights.

    The token scores of a layer sum to 1, so top-p selection takes at most the share p of its experts (rounded up): all
    of these if the load is balanced, fewer if not.

    Args:
        model: the model, on the meta device.

    Raises:
        UserError: the family is not supported, the configured experts do not match the model, or there are no shared
            experts to train.
    """
    layers = expert_layers(model, where)
    _check_language(model, layers, where)
    if spec.score_only:
        return ExpertPlan(0, 0, ("measures the experts' scores and trains nothing",))
    config, notes = _experts(spec, layers, where, base_dir)
    if config.shared_experts and not shared_names(model):
        family = model.config.model_type
        raise UserError([Problem(f"{where}.trainSharedExperts", f"{family} has no shared experts: leave it out")])
    rows = sum(len(ids) * expert_size(layer) for layer in layers for ids in [config.experts.get(layer.index, ())])
    others = trained_whole(model, config)
    active = sum(expert_size(layer) * int(cast(Any, layer.router.top_k)) for layer in layers)
    used = rows / sum(layer.num_experts * expert_size(layer) for layer in layers)
    return ExpertPlan(rows + others, round(active * max(spec.top_p, used)) + others, tuple(notes))


def _check_language(model: PreTrainedModel, layers: list[ExpertLayer], where: str) -> None:
    """Check that a composite model has experts in its language model only, as other layers reuse the layer numbers.

    Raises:
        UserError: a frozen part of the model has experts.
    """
    inside = language_names(model)
    other = next((layer.name for layer in layers if not inside(layer.name)), None)
    if other is not None:
        family = model.config.model_type
        raise UserError([Problem(where, f"{family} has experts that text does not reach ({other}): use sft with lora")])


def compare(size: ModelSize, load: Workload, adapter: AdapterSize) -> tuple[Alternative, ...]:
    """Return the memory of ESFT, full fine-tuning and LoRA with `adapter`, at the same ZeRO stage."""
    full = replace(load, tuned=None)
    loads = {"ESFT": load, "full": full, "LoRA r=16": replace(full, adapter=adapter)}
    return tuple(_alternative(method, size, one) for method, one in loads.items())


def _alternative(method: str, size: ModelSize, load: Workload) -> Alternative:
    memory = estimate(size, load)
    return Alternative(method, trainable(size, load), memory.optimizer, memory.total)


def _experts(spec: EsftSpec, layers: list[ExpertLayer], where: str, base_dir: str) -> tuple[ExpertConfig, list[str]]:
    if spec.expert_config is not None:
        config = load_expert_config(spec, where, base_dir, {layer.index: layer.num_experts for layer in layers})
        return config, [_chosen(config, layers, "")]
    most = {layer.index: tuple(range(math.ceil(spec.top_p * layer.num_experts))) for layer in layers}
    config = ExpertConfig(most, spec.train_shared_experts, spec.train_non_experts)
    notes = [_chosen(config, layers, "at most " if spec.score == "token" else "about ")]
    if min(layer.num_experts for layer in layers) < COARSE:
        few = min(layer.num_experts for layer in layers)
        notes.append(f"with {few} experts a layer, one alone is {1 / few:.0%}: ESFT is made for many fine ones")
    return config, notes


def _chosen(config: ExpertConfig, layers: list[ExpertLayer], bound: str) -> str:
    count, total = sum(map(len, config.experts.values())), sum(layer.num_experts for layer in layers)
    return f"trains {bound}{count} of {total} routed experts in {len(layers)} layers"
