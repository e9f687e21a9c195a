"""Memory of attention masks under `sdpa`: the layers that get one, and what torch saves for the backward pass."""

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
    """Number of distinct masks per batch: sliding-window and full-attention layers have different ones."""


def mask_bytes(masked: MaskedLayers, batch: int, length: int, dtype_bytes: int, checkpointing: bool) -> int:
    """Return the bytes of attention masks at the end of a forward pass.

    transformers makes each boolean mask once, with one byte per pair of tokens. `scaled_dot_product_attention` converts
    it to a bias in the queries' dtype at each call, and saves that for the backward pass (torch 2.13,
    `convert_boolean_attn_mask`). With gradient checkpointing, only one layer has a bias at a time.
    """
    biases = min(masked.layers, 1) if checkpointing else masked.layers
    return batch * length**2 * (masked.kinds + biases * dtype_bytes)


def masked_layers(
    model: PreTrainedModel, spec: TrainedSpec, attention: str, batch: int, length: int, kernel: bool
) -> MaskedLayers:
    """Return the attention layers of a stage that get a mask.

    No layer needs one for rows without padding, for right padding with a causal model (`model.right_padding`), or if
    packed documents are separated by their bounds (`model.document_attention`). Layers with a window or chunk shorter
    than the rows always get one, unless torch's variable-length kernel implements the window.

    Args:
        model: the model, on the meta device.
        attention: attention implementation of transformers. Only `sdpa` is counted here.
        batch: rows of a forward pass. A single row has no padding.
        length: tokens of the longest row.
        kernel: whether torch's variable-length kernel computes packed rows (`has_kernel`).
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
    """Return whether torch's variable-length kernel supports a device kind and an element size, without dropout."""
    return device == "cuda" and dtype_bytes == HALF and not dropout


def _kinds(decoder: Any) -> list[str | None]:
    """Return the kind of each attention layer."""
    found = [attention_kind(module) for module in decoder.modules() if isinstance(_causal_flag(module), bool)]
    return found or [None] * int(decoder.config.num_hidden_layers)


def _causal_flag(module: Any) -> Any:
    return getattr(module, "is_causal", None)


def _is_limited(config: Any, kind: str | None, length: int) -> bool:
    """Return whether rows are at least as long as a layer's window or chunk."""
    limit = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}.get(kind or "")
    size: int | None = getattr(config, limit, None) if limit else None
    return length >= size if size else False
