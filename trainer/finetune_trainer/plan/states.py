"""Memory of weights, gradients and AdamW's states, partitioned by ZeRO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.plan.model_size import ModelSize

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload

MASTER = 4
"""Bytes of a float32 copy of a parameter."""
MOMENTS = 8
"""Bytes of AdamW's two float32 moments."""


def trainable(size: ModelSize, load: Workload) -> int:
    """Return the number of parameters with a gradient."""
    if load.adapter is not None:
        return load.adapter.parameters
    return size.total - size.frozen if load.tuned is None else load.tuned


def weight_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of the weights: float32 if trained at ZeRO-0, else the compute dtype; partitioned by ZeRO-3.

    The frozen base of an adapter or of trained experts, and frozen parts of a composite model, are in the compute
    dtype. A quantized base has linear layers in 4 or 8 bits.
    """
    if load.tuned is not None:
        masters = load.tuned * (MASTER - load.dtype_bytes) if load.zero == 0 else 0
        return share(size.total * load.dtype_bytes, load, 3) + masters
    if load.adapter is None:
        each = MASTER if load.zero == 0 else load.dtype_bytes
        return share((size.total - size.frozen) * each + size.frozen * load.dtype_bytes, load, 3)
    base = size.total * load.dtype_bytes
    if load.quantized_bits is not None:
        base -= round(size.linear * (load.dtype_bytes - quantized_weight(load.quantized_bits, load.double_quant)))
    else:
        base = share(base, load, 3)  # transformers loads a quantized base whole on each worker
    return base + share(load.adapter.parameters * (MASTER if load.zero == 0 else load.dtype_bytes), load, 3)


def quantized_weight(bits: int, double_quant: bool) -> float:
    """Return the bytes per quantized weight with its quantization constants (QLoRA, arXiv 2305.14314, section 3).

    4 bits have one float32 constant per 64 weights; double quantization stores it in 8 bits, with one float32 per 256
    constants. 8 bits have one constant per row, which is negligible.
    """
    if bits == 8:
        return 1.0
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def gradient_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of the gradients; float32 at ZeRO-0, and with gradient accumulation at ZeRO-2 and 3."""
    summed = load.zero >= 2 and load.accumulation > 1
    each = MASTER if load.zero == 0 or summed else load.dtype_bytes
    return share(trainable(size, load) * each, load, 2)


def optimizer_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of AdamW's two float32 moments and DeepSpeed's float32 master weights, partitioned by ZeRO.

    DeepSpeed copies float32 weights too (`single_partition_of_fp32_groups` in `stage_1_and_2.py`).
    """
    each = MOMENTS if load.zero == 0 else MASTER + MOMENTS
    return share(trainable(size, load) * each, load, 1)


def reference_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of the reference model, in the dtype that the policy is loaded in; partitioned by ZeRO-3."""
    each = MASTER if load.zero == 0 and not load.frozen else load.dtype_bytes
    return share(size.total * each, load, 3) if load.reference else 0


def share(count: int, load: Workload, least_zero: int) -> int:
    """Return a worker's partition of `count`, which ZeRO partitions from stage `least_zero` on."""
    return -(-count // load.workers) if load.zero >= least_zero else count
