"""Batches of a causal model that are padded on the right: their attention needs no mask.

A causal model's output at a token depends on the tokens up to it, so padding behind a row's last token changes none of
the row's outputs; at the padding itself labels are ignored. This holds for attention, for convolutions and recurrences,
and for positions that a family counts in the mask. With a mask, transformers makes one of [B, 1, L, L] for `sdpa`: no
flash kernel takes it, and torch keeps it as a bias for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.model.document_masks import Hooks, decoder_of, is_generating

Keywords = dict[str, Any]


def drop_right_padding(model: Any) -> Hooks | None:
    """Let a model's backbone compute without the attention mask where a batch is padded on the right alone.

    The mask is taken away in front of the backbone: the auxiliary loss of a mixture of experts, the place of a reward
    model's score and the counts of tokens still see it.

    Args:
        model: a transformers model, or a PEFT model around one.

    Returns:
        what removes the hooks; None for a model that is not causal, which keeps its masks.
    """
    if not is_causal(model):
        return None
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The causal classes of some families (opt) call the decoder in the backbone themselves.
    entries = dict.fromkeys((whole.base_model, decoder_of(model)))
    return Hooks(*(entry.register_forward_pre_hook(_without_mask, with_kwargs=True) for entry in entries))


def is_causal(model: Any) -> bool:
    """Return whether each attention of a model's decoder says that it is causal, by the attribute `is_causal`.

    transformers decides by it what to do without a mask. A model without any such attention is not known to be causal.
    """
    decoder = decoder_of(model)
    flags = [module.is_causal for module in decoder.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(flags) and all(flags) and bool(getattr(decoder.config, "is_causal", True))


def is_right_padded(mask: Tensor) -> bool:
    """Return whether no row of a mask [B, L] of 0 and 1 has padding in front of a token."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _without_mask(backbone: nn.Module, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
    mask = kwargs.get("attention_mask")
    # Positions come with packed rows (`document_masks`) and generation, whose padding is on the left.
    other = kwargs.get("position_ids") is not None or is_generating(kwargs)
    if other or not isinstance(mask, Tensor) or mask.ndim != 2 or not is_right_padded(mask.to(torch.int8)):
        return args, kwargs
    return args, kwargs | {"attention_mask": None}
