"""Attention masks between packed documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_masks_for_generate

Keywords = dict[str, Any]


def separate_documents(model: Any, *, masks: bool) -> RemovableHandle:
    """Let a model take packed rows together with a mask of their padding.

    The auxiliary loss of a mixture of experts and the counts of tokens need the mask [B, L] of the padding. But where a
    decoder gets it, transformers no longer reads the documents off `position_ids`
    (`masking_utils.find_packed_sequence_indices`). The hook that is registered here takes the mask away between the
    two; in a packed row the padding is a document of its own.

    Args:
        model: a transformers model, or a PEFT model around one.
        masks: whether the decoder gets attention masks made from the positions in place of the padding's. The code of
            some families (gpt_oss, opt and others in transformers 5.23) does not pass the positions on to the function
            that makes them.

    Returns:
        what removes the hook.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: nn.Module = whole.get_decoder()
    return decoder.register_forward_pre_hook(partial(_without_padding_mask, masks), with_kwargs=True)


@contextmanager
def documents_separated(model: Any, *, masks: bool) -> Iterator[None]:
    """Apply `separate_documents` for the time of a `with` block."""
    handle = separate_documents(model, masks=masks)
    try:
        yield
    finally:
        handle.remove()


def _without_padding_mask(masks: bool, decoder: Any, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
    padding, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if not isinstance(padding, Tensor) or padding.ndim != 2 or positions is None or _is_generating(kwargs):
        return args, kwargs
    return args, kwargs | {"attention_mask": _between_documents(decoder, positions) if masks else None}


def _is_generating(kwargs: Keywords) -> bool:
    """Whether the call is one of `generate`, whose left-padded prompts are no packed rows."""
    return kwargs.get("past_key_values") is not None or bool(kwargs.get("use_cache"))


def _between_documents(decoder: Any, positions: Tensor) -> Any:
    """Return what the decoder's family makes of positions: one mask, or one for each kind of layer."""
    # The masks depend on the embeddings' shape, dtype and device alone.
    embeddings = torch.empty((*positions.shape, 0), dtype=decoder.dtype, device=positions.device)
    return create_masks_for_generate(decoder.config, embeddings, None, None, positions)
