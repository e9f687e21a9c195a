"""Pass packed batches to a decoder as one row with the bounds of the documents.

Kernels that take bounds of documents require one row: transformers separates documents for flash attention only where
the batch has one row or bounds are passed (`modeling_flash_attention_utils._is_packed_sequence`, transformers 5.23),
and causal-conv1d and flash-linear-attention support bounds for one row only. Outside of the decoder, the loss, the
router's auxiliary loss and the token counts get the batch as it was collated.
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
    """Return whether a decoder's attention should separate documents by their bounds, without a mask.

    These are the families that support flash attention in transformers and therefore pass window, scale and dropout.
    Chunked attention always needs a mask.

    Args:
        decoder: a transformers model, which may be on the meta device.
        attention: its attention implementation.
    """
    if getattr(decoder.config, "attention_chunk_size", None):
        return False
    flash = is_flash_attention_requested(requested_attention_implementation=attention)
    return flash or (attention == "sdpa" and bool(decoder._supports_flash_attn))


class OneRow:
    """Hooks that join a packed batch's rows in front of a decoder, and split its outputs into rows again.

    The decoder gets [1, B * L] and not [B, L], positions that restart at 0 with each document, and the documents'
    bounds: int32 `cu_seq_lens_q` and `cu_seq_lens_k` [documents + 1], the ints `max_length_q` and `max_length_k`, and
    int32 `seq_idx` [1, B * L], the number of each token's document. These are the names of transformers'
    `FlashAttentionKwargs`. Under `sdpa` the bounds replace the attention mask. Padding is a separate document.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._shape: tuple[int, int] | None = None
        parameters = inspect.signature(decoder.forward).parameters.values()
        self._accepts_kwargs = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        register()

    def reset(self) -> None:
        """Discard the state of the previous batch, whose forward pass may have failed."""
        self._shape = None

    def lay_out(self, args: Any, kwargs: Keywords) -> tuple[Any, Keywords]:
        """Return the arguments of a packed batch as the arguments of one row."""
        positions = kwargs["position_ids"]
        text = positions[0] if positions.ndim == 3 else positions
        rows, length = self._shape = tuple(text.shape)
        flat = {name: _as_one_row(value, rows, length) for name, value in kwargs.items()}
        flat["position_ids"] = positions.reshape(*positions.shape[:-2], 1, -1)
        bounds, document_ids = _bounds(text.flatten())
        flat["attention_mask"] = as_mask(bounds.cpu()) if self._decoder.config._attn_implementation == "sdpa" else None
        return tuple(_as_one_row(value, rows, length) for value in args), flat | self._kernel_arguments(
            bounds, document_ids
        )

    def put_back(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        """Split the outputs into the batch's rows; a forward hook, which leaves other batches unchanged."""
        shape, self._shape = self._shape, None
        return output if shape is None or shape[0] == 1 else _in_rows(output, *shape)

    def _kernel_arguments(self, bounds: Tensor, document_ids: Tensor) -> Keywords:
        if not self._accepts_kwargs:
            return {}
        longest = int(bounds.diff().max())
        ends = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "seq_idx": document_ids}
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
    """Reshape an output, or each tensor of a tuple or a ModelOutput, from [1, B * L, ...] to [B, L, ...]."""
    if isinstance(output, Tensor):
        flat = output.shape[:2] == (1, rows * length)
        return output.reshape(rows, length, *output.shape[2:]) if flat else output
    if isinstance(output, tuple):
        return tuple(_in_rows(one, rows, length) for one in output)
    if isinstance(output, dict):
        for name in list(output):
            output[name] = _in_rows(output[name], rows, length)
    return output
