"""FlashAttention on a CPU: transformers' code with fakes of flash_attn's functions that record calls."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as utils


class FlashStandIn:
    """Replaces flash_attn's functions while a test runs.

    Attributes:
        bounds: `cu_seqlens_q` of each call of the variable-length function.
        whole: query shapes of each call of the fixed-length function.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bounds: list[list[int]] = []
        self.whole: list[tuple[int, ...]] = []

        def flash_attn_func(
            q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
            causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        ) -> Tensor:  # fmt: skip
            self.whole.append(tuple(q.shape))
            return _attention(q, k, v, softmax_scale, causal, window_size)

        def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
            max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
            window_size: tuple[int, int] = (-1, -1),
        ) -> Tensor:  # fmt: skip
            assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
            self.bounds.append(cu_seqlens_q.tolist())
            lengths = cu_seqlens_q.diff().tolist()
            assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == len(q)
            parts = ((one[start:end][None] for one in (q, k, v)) for start, end in pairwise(cu_seqlens_q.tolist()))
            return torch.cat([_attention(*part, softmax_scale, causal, window_size)[0] for part in parts])

        self.varlen = flash_attn_varlen_func
        process = utils._lazy_define_process_function(flash_attn_varlen_func)
        functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
        monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, dict)))


def with_flash(model: Any) -> Any:
    """Switch a model that was built with another attention implementation to flash attention."""
    model.config._attn_implementation = "flash_attention_2"
    return model


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int]) -> Tensor:
    """Return the attention of rows [B, L, heads, width], with a mask for FlashAttention's causal and window options."""
    places = torch.arange(q.shape[1])
    back = places[:, None] - places
    seen = torch.ones_like(back, dtype=torch.bool)
    if causal:
        seen &= back >= 0
    if window[0] >= 0:
        seen &= back <= window[0]
    states = (one.transpose(1, 2) for one in (q, k, v))
    out = scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)
