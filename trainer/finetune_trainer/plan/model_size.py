"""Sizes of a model and its adapter, computed on torch's meta device from the configuration, without allocation."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from finetune_api.problems import Problem
from finetune_api.training import Lora
from finetune_trainer.errors import UserError
from finetune_trainer.model.composite import language_names
from finetune_trainer.model.expert_matmul import padded_rank
from finetune_trainer.model.lora import find_targets, lora_config
from finetune_trainer.model.task import Task, as_reward, auto_class


@dataclass(frozen=True)
class AdapterSize:
    """Size of an adapter, summed over all adapted layers. A stack is one tensor with the weights of all experts."""

    parameters: int
    """Trainable parameters, including fully trained modules."""
    input_features: int
    """Sum of the input features of adapted linear layers."""
    rank_features: int
    """Sum of the ranks of adapted linear layers."""
    stack_parameters: int = 0
    """Trainable parameters on stacks."""
    stack_factors: int = 0
    """Elements of the stacks' LoRA factors with padded ranks, as they are multiplied."""
    stack_ranks: int = 0
    """Sum of the padded ranks of adapted stacks."""
    stack_weights: int = 0
    """Elements of adapted stacks."""

    def active(self, size: ModelSize) -> int:
        """Return the trainable parameters that one token is multiplied by."""
        if not self.stack_parameters:
            return self.parameters
        used = self.stack_parameters * size.experts_per_token // size.experts
        return self.parameters - self.stack_parameters + used


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, with shared parameters counted once, and the dimensions that activations depend on."""

    family: str
    total: int
    embedding: int
    """Parameters of all embedding tables."""
    head: int
    """Parameters of the output head's matrix, also if tied to the input embedding."""
    tied: bool
    linear: int
    """Weights of linear layers without the head, which bitsandbytes quantizes (unlike stacked experts)."""
    largest_layer: int
    """Parameters of the largest decoder or encoder layer."""
    expert: int
    """Parameters of all routed experts."""
    experts: int
    """Routed experts per layer; 0 in a dense model."""
    experts_per_token: int
    expert_layers: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    """Width of the dense MLP."""
    expert_intermediate: int
    gated: bool
    """Whether the MLP has a gate (SwiGLU, GeGLU)."""
    query_key_norm: bool
    layer_norm: bool
    """Whether the norms are LayerNorm, as in BERT, instead of RMSNorm."""
    vocab: int
    attention_dropout: bool
    hidden_dropout: bool
    frozen: int = 0
    """Parameters of a composite model outside its language model; included in `total`, never trained."""

    @property
    def active(self) -> int:
        """Parameters that one token passes through."""
        language = self.total - self.frozen
        if not self.experts:
            return language
        return language - self.expert + self.expert * self.experts_per_token // self.experts

    @property
    def matmul(self) -> int:
        """Parameters that one token is multiplied by: the active ones without embedding lookups, with the head."""
        return self.active - self.embedding + (self.head if self.tied else 0)


def meta_model(config: PretrainedConfig, task: Task = "causal") -> PreTrainedModel:
    """Return the model of a configuration on the meta device.

    Raises:
        UserError: the family has no head for the task, or the configuration is inconsistent.
    """
    if task == "reward":
        config = as_reward(deepcopy(config), None)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(task).from_config(config, trust_remote_code=False)
            return model
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError([Problem("model", f"{config.model_type} can't be built: {reason}")]) from error


def model_size(model: PreTrainedModel) -> ModelSize:
    """Return the sizes of a model, on any device; dimensions of a composite model are those of its language model."""
    config, inside = model.config.get_text_config(), language_names(model)
    named = [(name, module) for name, module in model.named_modules() if inside(name)]
    embeddings = [module for _, module in named if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head_weight = getattr(head, "weight", None)
    targets = find_targets(model)
    every = dict(model.named_parameters())
    weights = {name: weight for name, weight in every.items() if inside(name)}
    layers = _layer_lists([module for _, module in named])
    expert_names = [name for name in weights if ".experts." in name]
    heads = _first(config, "num_attention_heads", default=1)
    hidden = _first(config, "hidden_size", "n_embd", default=1)
    intermediate = _first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    modules = [name for name, _ in named]
    return ModelSize(
        family=model.config.model_type,
        total=sum(weight.numel() for weight in every.values()),
        embedding=sum(module.weight.numel() for module in embeddings),
        head=0 if head_weight is None else head_weight.numel(),
        tied=any(module.weight is head_weight for module in embeddings),
        linear=sum(_linear_weight(model, name).numel() for name in targets.linears),
        largest_layer=max((_count(layer) for layer in layers), default=0),
        expert=sum(weights[name].numel() for name in expert_names),
        experts=_first(config, "num_experts", "num_local_experts", "n_routed_experts") if expert_names else 0,
        experts_per_token=_first(config, "num_experts_per_tok") if expert_names else 0,
        expert_layers=sum(any(".experts." in f".{name}." for name, _ in layer.named_modules()) for layer in layers),
        hidden=hidden,
        layers=_first(config, "num_hidden_layers", "n_layer", default=len(layers)),
        heads=heads,
        key_value_heads=_first(config, "num_key_value_heads", default=heads),
        head_dim=_first(config, "head_dim", "v_head_dim", default=hidden // heads),
        intermediate=intermediate,
        expert_intermediate=_first(config, "moe_intermediate_size", default=intermediate),
        gated=any(name.endswith(("gate_proj", "gate_up_proj", "mlp.Wi")) for name in (*modules, *weights)),
        query_key_norm=any(name.endswith(("q_norm", "query_layernorm")) for name in modules),
        layer_norm=any(isinstance(module, nn.LayerNorm) for _, module in named),
        vocab=config.vocab_size,
        attention_dropout=_positive(config, "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"),
        hidden_dropout=_positive(config, "hidden_dropout_prob", "hidden_dropout", "resid_pdrop"),
        frozen=sum(weight.numel() for name, weight in every.items() if not inside(name)),
    )


def adapter_size(model: PreTrainedModel, spec: Lora, path: str = "lora") -> AdapterSize:
    """Return the size of the adapter of `spec`. Attaches it to `model`, which must be on the meta device.

    Raises:
        UserError: see `lora_config`.
    """
    from peft import get_peft_model  # slow to import
    from peft.tuners.lora.layer import ParamWrapper

    with warnings.catch_warnings(), torch.device("meta"):  # else PEFT initializes on the CPU
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, lora_config(spec, model, path))
    trained = [(name, weight) for name, weight in adapted.named_parameters() if weight.requires_grad]
    stacks = [one for one in adapted.modules() if isinstance(one, ParamWrapper) and one.num_experts > 1]
    on_stacks = {id(pair.weight) for one in stacks for pairs in (one.lora_A, one.lora_B) for pair in pairs.values()}
    down = [weight for name, weight in trained if ".lora_A." in name and id(weight) not in on_stacks]
    stacked = sum(weight.numel() for _, weight in trained if id(weight) in on_stacks)
    padded = padded_rank(spec.r)
    return AdapterSize(
        parameters=sum(weight.numel() for _, weight in trained),
        input_features=sum(weight.shape[1] for weight in down),
        rank_features=sum(weight.shape[0] for weight in down),
        stack_parameters=stacked,
        stack_factors=stacked * padded // spec.r,
        stack_ranks=padded * len(stacks),
        stack_weights=sum(one.get_param().numel() for one in stacks),  # type: ignore[no-untyped-call]  # PEFT's
    )


def without_experts(model: PreTrainedModel, spec: Lora) -> tuple[AdapterSize, list[str]]:
    """Return the size of an adapter on linear layers only, without stacked experts, and the names of the layers."""
    names = sorted({name.rpartition(".")[2] for name in find_targets(model).linears})
    return adapter_size(model, spec.model_copy(update={"target_modules": names})), names


def _layer_lists(modules: list[nn.Module]) -> list[nn.Module]:
    """Return the layers of the `ModuleList` with the most parameters."""
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    return [*max(lists, key=lambda modules: _count(modules), default=nn.ModuleList())]


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _linear_weight(model: PreTrainedModel, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _positive(config: PretrainedConfig, *names: str) -> bool:
    return any((getattr(config, name, None) or 0) > 0 for name in names)


def _first(config: PretrainedConfig, *names: str, default: int = 0) -> int:
    """Return the first of the configuration's fields that is a nonzero number."""
    values = (getattr(config, name, None) for name in names)
    return next((math.ceil(value) for value in values if isinstance(value, (int, float)) and value), default)
