"""Composite models (a language model with encoders of images, video or sound) that are trained on text alone.

The language model trains. Every other part (vision tower, projector, audio encoder) is frozen when the model loads, so
that it has no gradients and no optimizer states and adapters stay out of it. `training.write_back` writes it into the
result as the checkpoint has it.
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
"""Heads of models that score texts, which `get_output_embeddings` does not return."""


class AutoLanguageModel:
    """transformers' auto class for models that continue text.

    It builds and loads a composite model whole, with all but its language model frozen. `AutoModelForCausalLM` knows
    only some composite families, and of others (Qwen3.5) it loads the language model alone, so that a saved result
    lacks the vision tower.
    """

    _scores = False
    _plain: Any = AutoModelForCausalLM
    _composite: Any = AutoModelForMultimodalLM

    @classmethod
    def from_config(cls, config: PretrainedConfig, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
        """As transformers' `from_config`, which never runs code of the model's own.

        Raises:
            UserError: a composite family that can't be used with text alone.
        """
        assert not trust_remote_code
        model: PreTrainedModel = cls._class_for(config).from_config(config, trust_remote_code=False, **options)
        return for_text(model)

    @classmethod
    def from_pretrained(cls, name: str, trust_remote_code: bool = False, **options: Any) -> Any:
        """As transformers' `from_pretrained`, also with `output_loading_info`; it never runs code of the model's own.

        Raises:
            UserError: a composite family that can't be used with text alone.
        """
        assert not trust_remote_code
        config = options.get("config") or AutoConfig.from_pretrained(
            name, revision=options.get("revision"), trust_remote_code=False
        )
        loaded = cls._class_for(config).from_pretrained(name, trust_remote_code=False, **options)
        for_text(loaded[0] if isinstance(loaded, tuple) else loaded)
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
    """As `AutoLanguageModel`, for models that score texts."""

    _scores = True
    _plain = AutoModelForSequenceClassification
    _composite = AutoModelForSequenceClassification


def for_text(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze the parts of a composite model that text does not pass through; returns the same model."""
    if is_composite(model.config):
        inside = language_names(model)
        for name, parameter in model.named_parameters():
            if not inside(name):
                parameter.requires_grad_(False)
        _take_text_inputs(model)
        _name_experts(model.config.get_text_config())
    return model


def language_names(model: PreTrainedModel) -> Names:
    """A predicate: whether a module or parameter of that full name belongs to the language model or its head.

    It is true for every name of a model that is not composite.
    """
    if not is_composite(model.config):
        return lambda name: True
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    own = [module for module in (decoder, head) if module is not None]
    roots = [name for name, module in model.named_modules() if any(module is one for one in own)]
    roots += [name for name in _HEADS if hasattr(model, name)]
    other = _other_modalities(model.config)

    def inside(name: str) -> bool:
        return any(_within(name, root) for root in roots) and not (other and other.search(name))

    return inside


def frozen_roots(model: PreTrainedModel) -> list[str]:
    """The topmost modules of a composite model that are frozen as a whole, by full name; none in other models."""
    inside = language_names(model)
    roots: list[str] = []
    for name, module in model.named_modules():
        owned = [parameter for parameter, _ in module.named_parameters(prefix=name)]
        if owned and not any(map(inside, owned)) and not any(_within(name, root) for root in roots):
            roots.append(name)
    return roots


def frozen_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of the frozen parts."""
    inside = language_names(model)
    return [parameter for name, parameter in model.named_parameters() if not inside(name)]


def frozen_note(model: Any) -> str | None:
    """Return one line on what training leaves alone of a composite model, adapted or not; None for other models."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # ZeRO-3 leaves empty tensors in place of the weights it has divided.
    count = sum(getattr(weight, "ds_numel", None) or weight.numel() for weight in frozen_parameters(whole))
    if not count:
        return None
    roots = frozen_roots(whole)
    listed = ", ".join(roots[:_SHOWN]) + (f" and {len(roots) - _SHOWN} more" if len(roots) > _SHOWN else "")
    verbs = "stays frozen and is" if len(roots) == 1 else "stay frozen and are"
    return f"{listed} ({count:,} parameters) {verbs} written back unchanged: only the language model trains"


def shrink_frozen(model: PreTrainedModel, precision: Precision) -> None:
    """Hold frozen parts in the precision that the stage computes in: only trained weights need float32 copies.

    A model that ZeRO-3 has divided, or that has no such copies, is left as it is.
    """
    if precision.weights == precision.compute:
        return
    for parameter in frozen_parameters(model):
        parameter.data = parameter.data.to(precision.compute)


def composite_skips(config: PretrainedConfig, auto: Any) -> list[str] | None:
    """Modules of a composite model that are not quantized: its frozen parts and its head; None for other models.

    Args:
        auto: the auto class that loads the model.
    """
    if not is_composite(config):
        return None
    with torch.device("meta"):
        model = auto.from_config(deepcopy(config), trust_remote_code=False)
    kept: list[str] = get_keys_to_not_convert(model)  # type: ignore[no-untyped-call]
    return sorted({*kept, *frozen_roots(model)})


def _name_experts(config: PretrainedConfig) -> None:
    """Let TRL's balance loss find the number of experts under the name that it looks for (GLM-4.5V has another)."""
    names = type(config).attribute_map
    if "num_local_experts" in names and not hasattr(config, "num_experts"):
        type(config).attribute_map = names | {"num_experts": names["num_local_experts"]}


def _take_text_inputs(model: PreTrainedModel) -> None:
    """Give the model what it asks for beside the tokens, where batches of text have it in another form or not at all.

    The hook is on the inner model, which both the family's own forward pass and TRL's fused loss call.
    """
    family = model.config.model_type
    if family in POSITION_ROWS or family in NEEDS_TOKEN_TYPES:
        model.base_model.register_forward_pre_hook(_text_inputs, with_kwargs=True)


def _text_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    config: Any = module.config
    positions, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    packed = positions is not None and positions.ndim == 2 and kwargs.get("attention_mask") is None
    if packed and config.model_type in POSITION_ROWS:
        kwargs["position_ids"] = positions[None].expand(_TEXT_AND_AXES, -1, -1)
    if ids is not None and config.model_type in NEEDS_TOKEN_TYPES and kwargs.get("mm_token_type_ids") is None:
        kwargs["mm_token_type_ids"] = torch.zeros_like(ids)
    return args, kwargs


def _other_modalities(config: PretrainedConfig) -> re.Pattern[str] | None:
    """Names within the decoder that belong to other parts."""
    pattern = INSIDE_DECODER.get(config.model_type)
    if config.model_type == "mllama":  # whole layers attend to images alone, and text skips them
        layers = "|".join(map(str, config.get_text_config().cross_attention_layers))
        pattern = rf"\.layers\.({layers})(\.|$)"
    return None if pattern is None else re.compile(pattern)


def _within(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(f"{root}.")
