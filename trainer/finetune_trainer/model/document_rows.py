"""Packed batches as one row: what reaches a decoder's attention and its recurrent kernels.

Kernels that take the bounds of documents want one row: transformers calls flash attention with documents apart only
where the batch has one row or the bounds are given (`modeling_flash_attention_utils._is_packed_sequence`, transformers
5.23), and causal-conv1d and flash-linear-attention know bounds for one row alone. Outside of the decoder, the loss, the
router's auxiliary loss and the counts of tokens see the batch as it was collated.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from finetune_trainer.model.document_attention import as_mask, register

Keywords = dict[str, Any]


def takes_bounds(decoder: Any, attention: str) -> bool:
    """Return whether a decoder's attention is expected to keep documents apart by their bounds, without a mask.

    These are families for which transformers has flash attention, and so pass all that it needs: the window, the
    scale, the dropout. Attention in chunks is a mask in any case.

    Args:
        decoder: a transformers model, which may be on the meta device.
        attention: its attention implementation.
    """
    if getattr(decoder.config, "attention_chunk_size", None):
        return False
    flash = is_flash_attention_requested(requested_attention_implementation=attention)
    return flash or (attention == "sdpa" and bool(decoder._supports_flash_attn))


class OneRow:
    """Hooks around a decoder's forward pass that lay a packed batch's rows end to end, and its outputs back in rows.

    The decoder gets [1, B * L] in place of [B, L], positions that start again at 0 with each document, and the
    documents' bounds: int32 `cu_seq_lens_q` and `cu_seq_lens_k` [documents + 1], the ints `max_length_q` and
    `max_length_k`, and int32 `seq_idx` [1, B * L], the number of each token's document. These are the names of
    transformers' `FlashAttentionKwargs`. Under `sdpa` the bounds take the attention mask's place. Padding is a
    document of its own.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._shape: tuple[int, int] | None = None
        parameters = inspect.signature(decoder.forward).parameters.values()
        self._named = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        register()

    def forget(self) -> None:
        """Forget the batch before, whose forward pass may have failed."""
        self._shape = None

    def lay_out(self, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
        """Return a packed batch's arguments as those of one row."""
        positions = kwargs["position_ids"]
        text = positions[0] if positions.ndim == 3 else positions
        rows, length = self._shape = tuple(text.shape)
        flat = {name: _as_one_row(value, rows, length) for name, value in kwargs.items()}
        flat["position_ids"] = positions.reshape(*positions.shape[:-2], 1, -1)
        bounds, numbers = _bounds(text.flatten())
        flat["attention_mask"] = as_mask(bounds.cpu()) if self._decoder.config._attn_implementation == "sdpa" else None
        return tuple(_as_one_row(value, rows, length) for value in args), flat | self._kernel_arguments(bounds, numbers)

    def put_back(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Return the outputs in the batch's rows; a forward hook, which does nothing after other batches."""
        shape, self._shape = self._shape, None
        return output if shape is None or shape[0] == 1 else _in_rows(output, *shape)

    def _kernel_arguments(self, bounds: Tensor, numbers: Tensor) -> Keywords:
        if not self._named:
            return {}
        longest = int(bounds.diff().max())
        ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "seq_idx": numbers}
        return ends | {"max_length_q": longest, "max_length_k": longest}


def _bounds(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return where documents start and end, int32 [documents + 1], and each token's document, int32 [1, T].

    Args:
        positions: [T], 0 at the start of each document.
    """
    first = positions == 0
    end = torch.tensor([len(positions)], device=positions.device)
    bounds = torch.cat([first.nonzero().flatten(), end]).to(torch.int32)
    return bounds, (first.cumsum(0) - 1).to(torch.int32)[None]


def _as_one_row(value: Any, rows: int, length: int) -> Any:
    if isinstance(value, Tensor) and value.shape[:2] == (rows, length):
        return value.reshape(1, rows * length, *value.shape[2:])
    return value


def _in_rows(output: Any, rows: int, length: int) -> Any:
    """Return an output, or each tensor in a tuple or a model's output, as [B, L, ...] where it is [1, B * L, ...]."""
    if isinstance(output, Tensor):
        flat = output.shape[:2] == (1, rows * length)
        return output.reshape(rows, length, *output.shape[2:]) if flat else output
    if isinstance(output, tuple):
        return tuple(_in_rows(one, rows, length) for one in output)
    if isinstance(output, dict):
        for name in list(output):
            output[name] = _in_rows(output[name], rows, length)
    return output
