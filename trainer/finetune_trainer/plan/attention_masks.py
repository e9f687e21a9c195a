"""Memory of attention masks under `sdpa`: which layers get one, and what torch keeps of it for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from finetune_api.stages import TrainedSpec
from finetune_trainer.model.document_attention import CHUNKED, SLIDING, attention_kind
from finetune_trainer.model.document_masks import decoder_of
from finetune_trainer.model.document_rows import takes_bounds
from finetune_trainer.model.right_padding import is_causal

HALF = 2
"""Bytes of float16 and bfloat16."""


@dataclass(frozen=True)
class MaskedLayers:
    """Attention layers that get a mask [B, 1, L, L] in training."""

    layers: int = 0
    kinds: int = 0
    """Different masks of a batch: those of layers with a window and of layers without one."""


def mask_bytes(masked: MaskedLayers, batch: int, length: int, dtype_bytes: int, checkpointing: bool) -> int:
    """Return the bytes of attention masks at the end of a forward pass.

    transformers makes each mask once, of one byte per pair of tokens. `scaled_dot_product_attention` turns it into a
    bias in the dtype of the queries at each call, and keeps that for the backward pass (torch 2.13,
    `convert_boolean_attn_mask`); with gradient checkpointing, one layer has its bias at a time.
    """
    biases = min(masked.layers, 1) if checkpointing else masked.layers
    return batch * length**2 * (masked.kinds + biases * dtype_bytes)


def masked_layers(
    model: PreTrainedModel, spec: TrainedSpec, attention: str, batch: int, length: int, kernel: bool
) -> MaskedLayers:
    """Return which attention layers of a stage get a mask.

    None do where rows are full, or padded on the right alone in front of a causal model (`model.right_padding`), and
    where packed documents are kept apart by their bounds (`model.document_attention`). Windows and chunks that are
    shorter than the rows are masks in any case, unless torch's variable-length kernel has the window.

    Args:
        model: on the meta device.
        attention: transformers' attention implementation. `eager` has its scores counted, flash attention no masks.
        batch: rows of a forward pass. A single row has no padding.
        length: tokens of the longest row.
        kernel: whether packed rows are computed by torch's variable-length kernel (`has_kernel`).
    """
    if attention != "sdpa":
        return MaskedLayers()
    decoder = decoder_of(model)
    packed = spec.packs
    on_the_right = spec.padding_side == "right"
    by_bounds = packed and takes_bounds(decoder, attention)
    whole = not by_bounds if packed else batch > 1 and not spec.fills_rows and not (on_the_right and is_causal(model))
    kinds = [kind for kind in _kinds(decoder) if whole or (_is_limited(decoder.config, kind, length))]
    if by_bounds and kernel:
        kinds = []
    return MaskedLayers(len(kinds), len(set(kinds)))


def has_kernel(device: str, dtype_bytes: int, dropout: bool) -> bool:
    """Return whether a device kind is expected to have torch's variable-length kernel for a dtype."""
    return device == "cuda" and dtype_bytes == HALF and not dropout


def _kinds(decoder: Any) -> list[str | None]:
    """Return the kind of each attention layer."""
    found = [attention_kind(module) for module in decoder.modules() if isinstance(_causal_flag(module), bool)]
    return found or [None] * int(decoder.config.num_hidden_layers)


def _causal_flag(module: Any) -> Any:
    return getattr(module, "is_causal", None)


def _is_limited(config: Any, kind: str | None, length: int) -> bool:
    """Return whether rows reach beyond the window or the chunk of a layer."""
    limit = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}.get(kind or "")
    size: int | None = getattr(config, limit, None) if limit else None
    return length >= size if size else False
