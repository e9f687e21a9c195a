"""Select the attention kernels for generation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

VARIABLE = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
"""torch's environment variable: `0` keeps cuDNN for generation, `1` deprioritizes it in training, too."""


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN attention in the context; torch then selects flash or memory-efficient attention.

    On compute capability 9.0 and 10.0 torch 2.13 prefers cuDNN, which builds an execution plan for every new shape
    (23 to 37 ms on Hopper, as measured outside this project). A growing answer has a new length at every token, so
    almost all of the time is spent on plans. Training repeats its shapes and keeps torch's choice.

    It has no effect if the user has set `VARIABLE`.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]  # torch has no type for it
    if VARIABLE in os.environ or not enabled:
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
