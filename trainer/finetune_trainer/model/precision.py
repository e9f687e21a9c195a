"""Choose the dtypes in which a stage loads, computes and saves a model."""

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
    """The dtypes of loaded weights, of the forward and backward pass, and of the saved result."""

    weights: torch.dtype
    compute: torch.dtype
    result: torch.dtype

    @property
    def autocast(self) -> dict[str, bool]:
        """Return the fields `bf16` and `fp16` of transformers' TrainingArguments."""
        return {"bf16": self.compute == torch.bfloat16, "fp16": self.compute == torch.float16}


def model_dtype(dtype: Dtype, accelerator: bool) -> torch.dtype:
    """Return the torch dtype for a job's `model.dtype` on this machine.

    `auto` is bfloat16 where the GPU supports it natively, else float32. A T4 or V100 only emulates bfloat16, much
    slower; `dtype: float16` trains there with loss scaling.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    return torch.bfloat16 if accelerator and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def precision(dtype: torch.dtype, *, trains_base: bool, zero: int) -> Precision:
    """Return the dtypes of a stage.

    Weights that AdamW trains are float32, or have a float32 copy: half precision loses small updates. A full fine-tune
    loads float32 weights and computes under autocast; `train_in_float32` converts weights that are trained on a frozen
    base. DeepSpeed keeps float32 copies itself, divided among the workers.
    """
    keeps_master = trains_base and zero == 0
    return Precision(torch.float32 if keeps_master else dtype, dtype, dtype)


def autocast_mixed(model: nn.Module) -> AbstractContextManager[Any]:
    """Return an autocast context for a model with both half-precision and float32 weights; else an empty context.

    In training, accelerate wraps the forward pass of PEFT's model. Generation calls the model inside, where without
    autocast a float32 layer fails on half-precision inputs.
    """
    formats = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    half = next((dtype for dtype in formats if dtype in (torch.bfloat16, torch.float16)), None)
    if half is None or torch.float32 not in formats:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, half)


def train_in_float32(model: nn.Module) -> None:
    """Convert every trained weight of a model to float32; frozen weights keep their dtype.

    PEFT does so for adapters but not for `modules_to_save`, such as a reward model's head. Near 0.02, bfloat16 values
    are 1e-4 apart: updates of 1e-5 vanish.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def round_weights(path: Path, dtype: torch.dtype) -> None:
    """Rewrite a safetensors file with its floating-point tensors in the given dtype."""
    weights = load_file(path)
    rounded = {name: one.to(dtype) if one.is_floating_point() else one for name, one in weights.items()}
    save_file(rounded, path, metadata={"format": "pt"})
