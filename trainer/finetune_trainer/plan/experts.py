"""What an `esft` stage trains, before its scores are known, and what full fine-tuning and LoRA would need instead."""

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
"""With so few experts a layer, choosing the least number of them still trains a large part of the model."""


@dataclass(frozen=True)
class ExpertPlan:
    """What an `esft` stage trains."""

    tuned: int
    """Trained weights; an upper bound where the experts are still to be selected by token scores."""
    active: int
    """Of the trained weights, those that an average token is multiplied by."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Alternative:
    """What another way of training the same stage would need."""

    method: str
    trainable: int
    optimizer: int
    """Bytes of one worker's AdamW states."""
    total: int
    """Bytes of one worker, all parts."""


def expert_plan(spec: EsftSpec, model: PreTrainedModel, where: str, base_dir: str) -> ExpertPlan:
    """The plan of a stage's trained weights.

    Token scores of a layer sum to 1, so the chosen experts are never more than p of them (rounded up): that many are
    needed where load is even, and fewer where it is not.

    Args:
        model: on the meta device.

    Raises:
        UserError: the family has no experts of the common shape, experts given by hand don't fit, or there are no
            shared experts to train.
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
    """Refuse a composite model whose frozen parts have experts: they would share the numbers of their layers.

    Raises:
        UserError: there are such experts.
    """
    inside = language_names(model)
    other = next((layer.name for layer in layers if not inside(layer.name)), None)
    if other is not None:
        family = model.config.model_type
        raise UserError([Problem(where, f"{family} has experts that text does not reach ({other}): use sft with lora")])


def compare(size: ModelSize, load: Workload, adapter: AdapterSize) -> tuple[Alternative, ...]:
    """The same stage by ESFT, by full fine-tuning and by LoRA on everything, at the same ZeRO stage."""
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
