"""Compute how a PEFT adapter changes the weights of its base, one weight at a time, with PEFT's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune_trainer.model.adapter import ADAPTER_WEIGHTS, NAME, attach_adapter

_BASE = "base_model.model."
"""Prefix that PEFT adds to the names of a model's parameters."""


@dataclass(frozen=True)
class Changes:
    """Changes by the weight's name in the model. Each is computed in float32 when it is called."""

    sums: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """The update to add to a weight."""
    scaled: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """A function from the base's weight to the new weight (DoRA)."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Weights that were trained in full."""
    base: dict[str, Tensor] = field(default_factory=dict)
    """Weights that replace the base's before any change is applied."""

    def names(self) -> set[str]:
        """Return the names of all weights that change."""
        return {*self.sums, *self.scaled, *self.whole}


def adapter_changes(model: PreTrainedModel, directory: str | Path) -> Changes | None:
    """Return the changes that an adapter makes to a model's weights.

    The adapter's layers are added to `model`, and its weights become zeros that take no memory, so that PEFT computes
    the updates on the CPU in float32.

    Args:
        model: on the meta device; it is modified.

    Returns:
        the changes, or None where PEFT has to merge on the whole model: tuners other than LoRA, biases of adapters, and
        tied embeddings that the adapter unties.

    Raises:
        UserError: the adapter lacks weights or does not fit the model.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*tied.keys(), *tied.values()}
    saved = _saved_base_weights(model, directory)
    _fill(model, saved)
    weights = dict(model.named_parameters())
    adapted: Any = attach_adapter(model, directory)
    changes = Changes(base={name: weights[name].detach() for name in saved})
    known = all([_add(changes, name, module) for name, module in _adapter_modules(adapted.get_base_model())])
    together = adapted.peft_config[NAME].ensure_weight_tying
    return changes if known and (together or not shared & changes.names()) else None


def _fill(model: nn.Module, saved: set[str]) -> None:
    """Replace each weight with one zero, expanded to the weight's shape; tied weights stay tied.

    Args:
        saved: names of the base's weights that the adapter's file holds; PEFT overwrites them, so they need memory.
    """
    zeros = {}
    for name, weight in model.named_parameters():
        zero = torch.zeros(weight.shape) if name in saved else torch.zeros(()).expand(weight.shape)
        zeros[id(weight)] = weight, nn.Parameter(zero, requires_grad=False)
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                module._parameters[name] = zeros[id(own)][1]


def _saved_base_weights(model: nn.Module, directory: str | Path) -> set[str]:
    """Return the names of the base's weights that an adapter's file holds.

    PEFT saves embeddings that have adapters or were resized.
    """
    with safe_open(Path(directory, ADAPTER_WEIGHTS), framework="pt") as file:
        names = {name.removeprefix(_BASE).replace(".base_layer", "") for name in file.keys()}  # noqa: SIM118
    return names & {name for name, _ in model.named_parameters()}


def _adapter_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that PEFT added, each with the full name of the module that it replaces."""
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name.replace(".base_layer", ""), module


def _add(changes: Changes, name: str, module: Any) -> bool:
    """Add a module's change to `changes`; return whether the module's type is supported."""
    if isinstance(module, ModulesToSaveWrapper):
        trained = module.modules_to_save[NAME]
        changes.whole.update({f"{name}.{own}": one.detach().float() for own, one in trained.state_dict().items()})
        return True
    if isinstance(module, ParamWrapper):
        changes.sums[f"{name}.{module.parameter_name}"] = partial(_delta, module)
        return True
    if type(module) not in (Linear, Embedding) or module.lora_bias.get(NAME):
        return False
    if NAME in module.lora_variant:
        changes.scaled[f"{name}.weight"] = partial(_merged, module)
    else:
        changes.sums[f"{name}.weight"] = partial(_delta, module)
    return True


@torch.no_grad()
def _delta(module: Any) -> Tensor:
    delta: Tensor = module.get_delta_weight(NAME)
    return delta.float()


@torch.no_grad()
def _merged(module: Any, weight: Tensor) -> Tensor:
    """Return a weight merged with an adapter whose update depends on the weight (DoRA)."""
    base = module.get_base_layer()
    kept, base.weight = base.weight, nn.Parameter(weight, requires_grad=False)
    try:
        module.merge(safe_merge=True, adapter_names=[NAME])
        merged: Tensor = base.weight.detach()
        return merged
    finally:
        base.weight = kept
        module.merged_adapters.clear()
        module._caches.clear()
