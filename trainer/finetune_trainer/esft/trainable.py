"""Choose the weights that ESFT trains: the selected experts' rows and, if configured, shared experts and the rest."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.esft.families import ExpertLayer, expert_layers, stack_names
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.split import SplitExperts, split_experts
from finetune_trainer.esft.zero3 import is_divided

_TUNED = "_tuned"
_SHARED = re.compile(r"(^|\.)layers\.\d+\.(\w+\.)*shared_")


def prepare(model: PreTrainedModel, config: ExpertConfig) -> list[ExpertLayer]:
    """Split the experts and require gradients for trained weights only; return the layers with trained experts."""
    layers = split_experts(model, config)
    trained = trained_names(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return layers


def trained_names(model: PreTrainedModel, config: ExpertConfig) -> set[str]:
    """Return the full names of a split model's trained parameters; parts that loading has frozen stay frozen."""
    layers = expert_layers(model)
    routed = {f"{layer.name}.{name}" for layer in layers for name, _ in layer.experts.named_parameters(recurse=False)}
    shared = shared_names(model)
    trained = {name for name in routed if name.endswith(_TUNED)}
    if config.shared_experts:
        trained |= shared
    if config.non_expert_modules:
        trained |= {name for name, weight in model.named_parameters() if weight.requires_grad} - routed - shared
    return trained


def shared_names(model: PreTrainedModel) -> set[str]:
    """Return the full names of the shared experts' parameters, which are next to the routed ones or to their block."""
    return {name for name, _ in model.named_parameters() if _SHARED.search(name)}


def trained_whole(model: PreTrainedModel, config: ExpertConfig) -> int:
    """Return the number of trained weights outside of routed experts."""
    return sum(model.get_parameter(name).numel() for name in trained_names(model, config) if not name.endswith(_TUNED))


def require_input_gradients(model: PreTrainedModel, layers: list[ExpertLayer]) -> None:
    """Make the first trained block's input require a gradient.

    ZeRO-3 gathers weights in the backward pass through hooks on gradients of a module's inputs. If all earlier layers
    are frozen there are no such gradients, and it fails with "the size of tensor a (0) must match" (DeepSpeed#5524).
    """
    if layers and is_divided(model.parameters()):
        layers[0].block.register_forward_pre_hook(_with_gradient)


def tuned_modules(model: PreTrainedModel) -> list[tuple[ExpertLayer, SplitExperts]]:
    """Return the split layers of a model with their experts."""
    return [(layer, layer.experts) for layer in expert_layers(model) if isinstance(layer.experts, SplitExperts)]


def expert_size(layer: ExpertLayer) -> int:
    """Return the number of weights of one routed expert."""
    return sum(getattr(layer.experts, name)[0].numel() for name in stack_names(layer.experts))


def _with_gradient(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *rest = args
    return (hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.detach().requires_grad_(), *rest)
