"""Remove the attention mask of right-padded batches in causal models.

A causal model's output at a token depends only on the tokens up to it, so padding after a row's last token changes none
of the row's outputs, and labels at the padding are ignored. This holds for attention, for convolutions and recurrences,
and for positions that a family computes from the mask. With a mask, transformers makes a mask [B, 1, L, L] for `sdpa`,
which flash kernels do not support and which torch keeps as a bias for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.model.document_masks import Hooks, decoder_of, is_generating

Keywords = dict[str, Any]


def drop_right_padding(model: Any) -> Hooks | None:
    """Register hooks that remove the attention mask in front of the backbone if a batch is only padded on the right.

    Code outside of the backbone still gets the mask: the auxiliary loss of a mixture of experts, the reward model's
    head, and token counts.

    Args:
        model: a transformers model, or a PEFT model around one.

    Returns:
        the hooks, or None for a model that is not causal, which keeps its masks.
    """
    if not is_causal(model):
        return None
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The causal classes of some families (opt) call the decoder in the backbone themselves.
    entries = dict.fromkeys((whole.base_model, decoder_of(model)))
    return Hooks(*(entry.register_forward_pre_hook(_without_mask, with_kwargs=True) for entry in entries))


def is_causal(model: Any) -> bool:
    """Return whether all attention modules of a model's decoder have `is_causal` set.

    transformers uses this attribute if there is no mask. A model without any such module is not known to be causal.
    """
    decoder = decoder_of(model)
    flags = [module.is_causal for module in decoder.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(flags) and all(flags) and bool(getattr(decoder.config, "is_causal", True))


def is_right_padded(mask: Tensor) -> bool:
    """Return whether no row of a mask [B, L] of 0 and 1 has padding before a token."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _without_mask(backbone: nn.Module, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
    mask = kwargs.get("attention_mask")
    # Positions come with packed rows (`document_masks`) and generation, whose padding is on the left.
    other = kwargs.get("position_ids") is not None or is_generating(kwargs)
    if other or not isinstance(mask, Tensor) or mask.ndim != 2 or not is_right_padded(mask.to(torch.int8)):
        return args, kwargs
    return args, kwargs | {"attention_mask": None}
