"""Load composite models (a language model with image, video or audio encoders) for training on text alone.

Only the language model trains. Every other part (vision tower, projector, audio encoder) is frozen when the model
loads, so it has no gradients, optimizer states or adapters. `model.composite_result` copies these parts from the
base's checkpoint into the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.base import get_keys_to_not_convert

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.model.composite_families import (
    INSIDE_DECODER,
    NEEDS_TOKEN_TYPES,
    POSITION_ROWS,
    is_composite,
    refusal,
)
from finetune_trainer.model.precision import Precision

Names = Callable[[str], bool]
_SHOWN = 4
_TEXT_AND_AXES = 4
"""Rows of positions: the text's, then time, height and width."""
_HEADS = ("score",)
"""Heads of reward models, which `get_output_embeddings` does not return."""


class AutoLanguageModel:
    """An auto class for causal language models, composite ones included.

    It builds and loads a composite model whole, with all but its language model frozen. `AutoModelForCausalLM` supports
    only some composite families, and for others (Qwen3.5) loads the language model alone, so that a saved result
    would lack the vision tower.
    """

    _scores = False
    _plain: Any = AutoModelForCausalLM
    _composite: Any = AutoModelForMultimodalLM

    @classmethod
    def from_config(cls, config: PretrainedConfig, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        """Build a model as transformers' `from_config` does, without custom code of the model.

        Raises:
            UserError: a composite family that can't be used with text alone.
        """
        assert not trust_remote_code
        model: PreTrainedModel = cls._class_for(config).from_config(config, trust_remote_code=False, **options)
        return freeze_other_modalities(model)

    @classmethod
    def from_pretrained(cls, name: str, trust_remote_code: bool = False, **options: Any) -> Any:
        """Load a model as transformers' `from_pretrained` does, without custom code of the model.

        Raises:
            UserError: a composite family that can't be used with text alone.
        """
        assert not trust_remote_code
        config = options.get("config") or AutoConfig.from_pretrained(
            name, revision=options.get("revision"), trust_remote_code=False
        )
        loaded = cls._class_for(config).from_pretrained(name, trust_remote_code=False, **options)
        freeze_other_modalities(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def _class_for(cls, config: PretrainedConfig) -> Any:
        if not is_composite(config):
            return cls._plain
        reason = refusal(config, cls._scores)
        if reason is not None:
            raise UserError([Problem("model", reason)])
        return cls._composite


class AutoScoringModel(AutoLanguageModel):
    """An auto class for reward models, composite ones included."""

    _scores = True
    _plain = AutoModelForSequenceClassification
    _composite = AutoModelForSequenceClassification


def freeze_other_modalities(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze the parts of a composite model that text does not pass through; return the same model."""
    if is_composite(model.config):
        inside = language_names(model)
        for name, parameter in model.named_parameters():
            if not inside(name):
                parameter.requires_grad_(False)
        _add_text_inputs(model)
        _alias_num_experts(model.config.get_text_config())
    return model


def language_names(model: PreTrainedModel) -> Names:
    """Return a predicate: whether a module or parameter, by full name, belongs to the language model or its head.

    The predicate is true for every name in a model that is not composite.
    """
    if not is_composite(model.config):
        return lambda name: True
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    own = [module for module in (decoder, head) if module is not None]
    roots = [name for name, module in model.named_modules() if any(module is one for one in own)]
    roots += [name for name in _HEADS if hasattr(model, name)]
    other = _other_modalities(model.config)

    def inside(name: str) -> bool:
        return any(_is_below(name, root) for root in roots) and not (other and other.search(name))

    return inside


def frozen_roots(model: PreTrainedModel) -> list[str]:
    """Return the full names of a composite model's topmost modules that are frozen as a whole; [] for other models."""
    inside = language_names(model)
    roots: list[str] = []
    for name, module in model.named_modules():
        owned = [parameter for parameter, _ in module.named_parameters(prefix=name)]
        if owned and not any(map(inside, owned)) and not any(_is_below(name, root) for root in roots):
            roots.append(name)
    return roots


def frozen_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of a composite model's frozen parts."""
    inside = language_names(model)
    return [parameter for name, parameter in model.named_parameters() if not inside(name)]


def frozen_note(model: Any) -> str | None:
    """Return a log line that names a composite model's frozen parts; None for other models.

    Args:
        model: a transformers model, or a PEFT model around one.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Under ZeRO-3 a divided weight is an empty tensor.
    count = sum(getattr(weight, "ds_numel", None) or weight.numel() for weight in frozen_parameters(whole))
    if not count:
        return None
    roots = frozen_roots(whole)
    listed = ", ".join(roots[:_SHOWN]) + (f" and {len(roots) - _SHOWN} more" if len(roots) > _SHOWN else "")
    verbs = "stays frozen and is" if len(roots) == 1 else "stay frozen and are"
    return f"{listed} ({count:,} parameters) {verbs} written back unchanged: only the language model trains"


def shrink_frozen(model: PreTrainedModel, precision: Precision) -> None:
    """Convert frozen parts to the dtype that the stage computes in: only trained weights need to be float32.

    Nothing happens where weights are loaded in that dtype, which includes ZeRO.
    """
    if precision.weights == precision.compute:
        return
    for parameter in frozen_parameters(model):
        parameter.data = parameter.data.to(precision.compute)


def composite_skips(config: PretrainedConfig, auto: Any) -> list[str] | None:
    """Return a composite model's modules that are not quantized, its frozen parts and its head; None for other models.

    Args:
        auto: the auto class that loads the model.
    """
    if not is_composite(config):
        return None
    with torch.device("meta"):
        model = auto.from_config(deepcopy(config), trust_remote_code=False)
    kept: list[str] = get_keys_to_not_convert(model)
    return sorted({*kept, *frozen_roots(model)})


def _alias_num_experts(config: PretrainedConfig) -> None:
    """Make `num_experts`, which TRL's balance loss reads, an alias where a family has another name (GLM-4.5V)."""
    names = type(config).attribute_map
    if "num_local_experts" in names and not hasattr(config, "num_experts"):
        type(config).attribute_map = names | {"num_experts": names["num_local_experts"]}


def _add_text_inputs(model: PreTrainedModel) -> None:
    """Add a hook that supplies inputs that the family needs and that text batches lack or have in another shape.

    The hook is on the inner model, which both the family's own forward pass and TRL's fused loss call.
    """
    family = model.config.model_type
    if family in POSITION_ROWS or family in NEEDS_TOKEN_TYPES:
        model.base_model.register_forward_pre_hook(_text_inputs, with_kwargs=True)


def _text_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    config: Any = module.config
    positions, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    unmasked = positions is not None and kwargs.get("attention_mask") is None
    if positions is not None and unmasked and positions.ndim == 2 and config.model_type in POSITION_ROWS:
        kwargs["position_ids"] = positions[None].expand(_TEXT_AND_AXES, -1, -1)
    if ids is not None and config.model_type in NEEDS_TOKEN_TYPES and kwargs.get("mm_token_type_ids") is None:
        kwargs["mm_token_type_ids"] = torch.zeros_like(ids)
    return args, kwargs


def _other_modalities(config: PretrainedConfig) -> re.Pattern[str] | None:
    """Return a pattern of names inside the decoder that belong to other modalities."""
    pattern = INSIDE_DECODER.get(config.model_type)
    if config.model_type == "mllama":  # its cross-attention layers attend to images alone, and text skips them
        layers = "|".join(map(str, config.get_text_config().cross_attention_layers))
        pattern = rf"\.layers\.({layers})(\.|$)"
    return None if pattern is None else re.compile(pattern)


def _is_below(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")
