"""Which number formats a stage loads, computes and saves in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
    """Return the dtype that a job's `model.dtype` means on this machine.

    `auto` is bfloat16 where the GPU computes in it, else float32. A T4 or V100 only emulates bfloat16, at a fraction of
    its speed; `dtype: float16` trains there with loss scaling.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.bfloat16 if accelerator and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def precision(dtype: torch.dtype, *, trains_base: bool, zero: int) -> Precision:
    """Formats for a stage.

    What AdamW trains is float32, or has a float32 copy: half precision loses small updates. A full fine-tune loads its
    weights so and computes under autocast; what is trained on a frozen base follows by `train_in_float32`. DeepSpeed
    keeps such copies itself, divided among the workers.
    """
    keeps_master = trains_base and zero == 0
    return Precision(torch.float32 if keeps_master else dtype, dtype, dtype)


def autocast_mixed(model: nn.Module) -> AbstractContextManager[Any]:
    """Compute in half precision where a model has weights in it and in float32; nothing for other models.

    Training does so by accelerate, which wraps the forward pass of PEFT's model and not that of the model inside, which
    generates: a float32 layer fails there on what a half-precision one gives it.
    """
    formats = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    half = next((dtype for dtype in formats if dtype in (torch.bfloat16, torch.float16)), None)
    if half is None or torch.float32 not in formats:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, half)


def train_in_float32(model: nn.Module) -> None:
    """Make every trained weight of a model float32; frozen ones stay as they are.

    PEFT does so for adapters but not for `modules_to_save` (a reward model's head is one). A bfloat16 weight of 0.02
    has steps of 1e-4: updates of 1e-5 vanish.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def round_weights(path: Path, dtype: torch.dtype) -> None:
    """Rewrite a safetensors file with its floating-point tensors in that format."""
    weights = load_file(path)
    rounded = {name: one.to(dtype) if one.is_floating_point() else one for name, one in weights.items()}
    save_file(rounded, path, metadata={"format": "pt"})
