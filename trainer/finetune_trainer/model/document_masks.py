"""Keep the attention of a model within each document of packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_masks_for_generate

from finetune_trainer.model.document_rows import OneRow, takes_bounds

Keywords = dict[str, Any]


class Form(StrEnum):
    """The form in which a decoder gets the bounds of documents. Positions always restart at 0 with each document."""

    POSITIONS = "positions"
    """No padding mask: transformers makes attention masks from the positions."""
    MASKS = "positions and masks"
    """Attention masks made from the positions, for families whose own code does not make them (gpt_oss and others in
    transformers 5.23)."""
    BOUNDS = "bounds"
    """One row with the documents' bounds (`document_rows.OneRow`)."""


def forms(model: Any) -> tuple[Form, ...]:
    """Return all forms in the order in which to try them with a model: those without masks first."""
    decoder = decoder_of(model)
    if takes_bounds(decoder, decoder.config._attn_implementation):
        return Form.BOUNDS, Form.POSITIONS, Form.MASKS
    return Form.POSITIONS, Form.MASKS, Form.BOUNDS


class Hooks:
    """Forward hooks that can be removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove the hooks from their modules."""
        for handle in self._handles:
            handle.remove()


def separate_documents(model: Any, form: Form) -> Hooks:
    """Register hooks that let a model take packed rows together with a padding mask.

    The auxiliary loss of a mixture of experts and the token counts need the padding mask [B, L]. But with that mask, a
    decoder of transformers ignores the documents in `position_ids` (`masking_utils.find_packed_sequence_indices`). The
    hook removes the mask in front of the decoder; in a packed row the padding is a separate document.

    Args:
        model: a transformers model, or a PEFT model around one.
    """
    decoder = decoder_of(model)
    rows = OneRow(decoder) if form == Form.BOUNDS else None
    before = decoder.register_forward_pre_hook(partial(_without_padding_mask, form, rows), with_kwargs=True)
    return Hooks(before) if rows is None else Hooks(before, decoder.register_forward_hook(rows.put_back))


@contextmanager
def documents_separated(model: Any, form: Form) -> Iterator[None]:
    """Apply `separate_documents` inside a `with` block."""
    hooks = separate_documents(model, form)
    try:
        yield
    finally:
        hooks.remove()


def decoder_of(model: Any) -> Any:
    """Return the decoder of a transformers model, or of a PEFT model around one; an encoder's backbone."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = whole.get_decoder()
    # The head of masked models (modernbert) may have the name `decoder`.
    return decoder if hasattr(decoder, "config") else whole.base_model


def is_generating(kwargs: Keywords) -> bool:
    """Return whether `generate` makes this call: its left-padded prompts are not packed rows."""
    return kwargs.get("past_key_values") is not None or bool(kwargs.get("use_cache"))


def _without_padding_mask(
    form: Form, rows: OneRow | None, decoder: nn.Module, args: Any, kwargs: Keywords
) -> tuple[Any, Keywords]:
    if rows is not None:
        rows.reset()
    padding, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if not isinstance(padding, Tensor) or padding.ndim != 2 or positions is None or is_generating(kwargs):
        return args, kwargs
    if rows is not None:
        return rows.lay_out(args, kwargs)
    return args, kwargs | {"attention_mask": _between_documents(decoder, positions) if form == Form.MASKS else None}


def _between_documents(decoder: Any, positions: Tensor) -> Any:
    """Return the attention masks that the decoder's family makes from positions: one, or one per kind of layer."""
    # The masks depend on the embeddings' shape, dtype and device alone.
    embeddings = torch.empty((*positions.shape, 0), dtype=decoder.dtype, device=positions.device)
    return create_masks_for_generate(decoder.config, embeddings, None, None, positions)
