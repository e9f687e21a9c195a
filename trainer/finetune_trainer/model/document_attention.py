"""Compute `sdpa` attention within each document of a packed row, without a mask of the whole batch.

transformers separates packed documents under `sdpa` with a mask [B, 1, L, L]. With a mask, torch can't use its flash
kernel, and its other kernels keep the mask as a floating-point bias for the backward pass, once per layer. `attend`
takes the documents' bounds in the mask's argument (`as_mask`), as flash attention takes `cu_seqlens`: it calls torch's
variable-length kernel on a GPU (`torch.nn.attention.varlen`), else causal attention once per document. All other calls
are passed to transformers' own function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of attention functions that neither torch's kernels nor `attend` support."""
CHUNKED, SLIDING = "chunked_attention", "sliding_attention"
KERNEL_CAPABILITY = (8, 0)
"""Minimum compute capability of a GPU for torch's variable-length kernel, which is FlashAttention-2."""
KERNEL_HEAD = 256
"""Largest head size of that kernel."""


def register() -> None:
    """Register `attend` as the `sdpa` attention of all models in this process."""
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def as_mask(bounds: Tensor) -> Tensor:
    """Return bounds in the shape of a 4-dimensional mask, which transformers passes to `attend` unchanged.

    Args:
        bounds: int32 [documents + 1], where documents start and end in the batch's only row. Keep them on the CPU, so
            that no layer waits for the device.
    """
    return bounds[None, None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa_attention_forward` does, or within each document.

    Args:
        query: [B, heads, L, width]; B is 1 where the mask holds bounds.
        key: [B, key heads, L, width].
        value: [B, key heads, L, value width].
        attention_mask: a mask of transformers, or bounds from `as_mask`.
        kwargs: `sliding_window` applies within documents.

    Returns:
        the output [B, L, heads, value width], and None for the weights.

    Raises:
        NotImplementedError: a layer passes bounds and an unsupported argument.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    _require_supported(module, is_causal, kwargs)
    window = _window(module, kwargs)
    query, key, value = _autocast(query, key, value)
    if _has_kernel(query, value, dropout):
        return _attend_by_kernel(query, key, value, attention_mask.flatten(), scaling, window), None
    lengths = attention_mask.flatten().diff().tolist()
    # Unlike slices, `split` has one backward for all documents.
    documents = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    parts = [_attend_document(module, document, dropout, scaling, window) for document in documents]
    return torch.cat(parts, dim=1), None


def _attend_document(
    module: nn.Module, document: tuple[Tensor, ...], dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Return the output [1, length, heads, width] of one document's queries, keys and values."""
    query, key, value = document
    length = query.shape[2]
    band = None if window is None or length <= window else _band(length, window, query.device)
    return sdpa_attention_forward(module, query, key, value, band, dropout, scaling, is_causal=True)[0]


def _require_supported(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    unknown = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{type(module).__name__} passes {', '.join(unknown)} to its attention")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError(f"{type(module).__name__} is not causal")


def _window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """Return how many tokens each token attends to at most, itself included; None for all tokens before it.

    Under `sdpa` transformers puts the window into the mask. Families that have a window and do not pass it are refused.
    """
    window: int | None = kwargs.get("sliding_window")
    kind = attention_kind(module)
    if kind == CHUNKED or (kind == SLIDING and window is None):
        raise NotImplementedError(f"{type(module).__name__} does not pass the bounds of its {kind} on")
    return window


def attention_kind(module: nn.Module) -> str | None:
    """Return the kind of a layer's attention by its configuration, such as `sliding_attention`, or None."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and index is not None and index < len(kinds):
        return str(kinds[index])
    if getattr(config, "attention_chunk_size", None):
        return CHUNKED
    return SLIDING if getattr(config, "sliding_window", None) else None


def _autocast(*states: Tensor) -> list[Tensor]:
    """Return the states in the dtype to which autocast would cast them for torch's own attention."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    return [one.to(torch.get_autocast_dtype(device)) for one in states]


def _has_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether torch's variable-length kernel supports these states."""
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= KERNEL_HEAD
    half = query.dtype in (torch.float16, torch.bfloat16)
    if not (query.is_cuda and torch.version.cuda and half and fits and not dropout):
        return False
    return torch.cuda.get_device_capability(query.device) >= KERNEL_CAPABILITY


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Return the output [1, L, heads, width] of torch's variable-length kernel."""
    starts, longest = bounds.to(query.device, non_blocking=True), int(bounds.diff().max())
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    span = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=span, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[None]


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Return a mask [1, 1, length, length]: each token attends to itself and to the `window` - 1 tokens before it."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions
    return ((distance >= 0) & (distance < window))[None, None]
