"""Find a model's routed experts, in the structure that transformers 5 gives most mixture-of-experts families.

In that structure, a module of experts has its weights stacked in Parameters [experts, ...] (transformers'
`use_experts_implementation`) and is called as `experts(hidden, top_k_index, top_k_weights)`. Its parent also has a
router that returns `(logits, top_k_weights, top_k_index, ...)`. Families with that structure need no code here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_STACKS = {
    True: ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    False: ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
}


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one decoder layer."""

    index: int
    """The layer's index in the model; dense layers count too."""
    name: str
    """Full name of the experts' module."""
    experts: nn.Module
    router: nn.Module
    block: nn.Module
    """The parent of router, experts and shared experts."""

    @property
    def num_experts(self) -> int:
        """Return the number of routed experts."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def stacks(self) -> tuple[str, ...]:
        """Return the names of the Parameters [experts, ...] in the experts' module before it is split."""
        return stack_names(self.experts)


def stack_names(experts: nn.Module) -> tuple[str, ...]:
    """Return the names of an experts module's stacked weights, which have one row per expert."""
    names = _STACKS[bool(experts.has_gate)]
    return tuple(name for name in names if experts.has_bias or not name.endswith("_bias"))


def expert_layers(model: PreTrainedModel, where: str = "model") -> list[ExpertLayer]:
    """Return the layers with routed experts, in order.

    Args:
        model: may be on the meta device, or split.

    Raises:
        UserError: the model has no routed experts, or its family has another structure.
    """
    family = model.config.model_type
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")]
    if not found:
        other = any("expert" in name for name, _ in model.named_modules())
        reason = "does not stack the weights of its experts" if other else "has no experts"
        message = f"{family} {reason}: esft trains mixtures of experts whose weights are stacked"
        raise UserError([Problem(where, message)])
    layers = [_layer(model, name, module, family, where) for name, module in found]
    return sorted(layers, key=lambda layer: layer.index)


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the routers by layer, also for other structures of experts and under PEFT's wrappers; {} if dense."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        number = _LAYER.search(f"{name}.")
        if number is not None and "experts" in dict(module.named_children()):
            others = (child for key, child in module.named_children() if key != "experts" and hasattr(child, "top_k"))
            found |= {int(number[1]): router for router in others}
    return found


def _layer(model: PreTrainedModel, name: str, experts: nn.Module, family: str, where: str) -> ExpertLayer:
    number = _LAYER.search(name)
    block = model.get_submodule(name.rpartition(".")[0])
    router = next((child for child in block.children() if child is not experts and hasattr(child, "top_k")), None)
    fault = None
    if number is None:
        fault = f"its experts ({name}) are in no numbered layer"
    elif router is None:
        fault = f"the parent of its experts ({name}) has no router with a top_k"
    elif experts._is_expert_parallel:
        fault = "its experts are divided among devices (expert parallelism)"
    elif foreign := _foreign(experts):
        fault = f"its experts hold {foreign}, which is not one row per expert"
    if fault is not None or number is None or router is None:
        raise UserError([Problem(where, f"{family} does not have the structure that esft supports: {fault}")])
    return ExpertLayer(int(number[1]), name, experts, router, block)


def _foreign(experts: nn.Module) -> str | None:
    """Return the name of a Parameter that is not a stack of rows, or None."""
    known = {name + part for name in stack_names(experts) for part in ("", "_frozen", "_tuned")}
    return next((name for name, _ in experts.named_parameters(recurse=False) if name not in known), None)
