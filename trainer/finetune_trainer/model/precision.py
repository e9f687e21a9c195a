"""Which number formats a stage loads, computes and saves in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from finetune_api.model import Dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """`weights` as loaded, `compute` in forward and backward, `result` as saved."""

    weights: torch.dtype
    compute: torch.dtype
    result: torch.dtype

    @property
    def autocast(self) -> dict[str, bool]:
        """transformers' `bf16` and `fp16` switches."""
        return {"bf16": self.compute == torch.bfloat16, "fp16": self.compute == torch.float16}


def model_dtype(dtype: Dtype, accelerator: bool) -> torch.dtype:
    """The dtype a job's `model.dtype` means on this machine."""
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.bfloat16 if accelerator and torch.cuda.is_bf16_supported() else torch.float32


def precision(dtype: torch.dtype, *, trains_base: bool, zero: int) -> Precision:
    """Formats for a stage.

    Weights that AdamW trains in half precision lose small updates, so a full fine-tune keeps them in float32 and
    computes under autocast. DeepSpeed keeps such a copy itself, divided among the workers; a frozen base needs none.
    """
    keeps_master = trains_base and zero == 0
    return Precision(torch.float32 if keeps_master else dtype, dtype, dtype)
