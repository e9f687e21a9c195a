"""Memory of communication: buckets of DeepSpeed and DDP, gathered weights, buffers of NCCL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.plan.expert_copies import cast_elements
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.states import MASTER, share, trainable

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload

BUCKET = 500_000_000
"""Maximum elements of DeepSpeed's reduce and all-gather buckets (its defaults)."""
BUCKET_UNIT = 1 << 16
"""Buckets are multiples of this number of elements; DeepSpeed requires a multiple of its NCCL alignment, 2."""
LIVE = 1_000_000_000
"""Maximum elements that ZeRO-3 gathers ahead (`stage3_max_live_parameters`, its default)."""
NCCL_CHANNELS = 24
"""Channels of an NCCL communicator over NVLink."""
NCCL_CONNECTION = (4 << 20) + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
"""Buffer bytes of one connection in NCCL 2.29: `Simple` has 4 MiB (`NCCL_BUFFSIZE`), `LL128` 120 elements of 8 bytes
for each of 640 threads in 8 steps, `LL` 8 lines of 16 bytes for each of 512 threads in 8 steps."""


def nccl_bytes(load: Workload) -> int:
    """Return the bytes of NCCL's buffers: a ring and a tree, each with a connection for every channel."""
    return 2 * NCCL_CHANNELS * NCCL_CONNECTION if load.kind == "cuda" and load.workers > 1 else 0


def buffer_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of weight and gradient copies and of communication buckets.

    - ZeRO-0: autocast's half-precision weights (`expert_copy_bytes` counts the experts). Gradients are views of DDP's
      buckets.
    - ZeRO-1 to 3: a gradient bucket, or two if communication overlaps with computation (`setup_buckets` in
      `stage_1_and_2.py`; `stage3.py` has one), and the float32 copy of the worker's gradient partition. ZeRO-3 also has
      gathered weights; ZeRO-1 and 2 all-gather into the weights, for any `allgather_bucket_size`
      (`all_gather_dp_groups`).
    """
    count, half = trainable(size, load), load.dtype_bytes < MASTER
    if load.zero == 0:
        stacks = load.adapter.stack_parameters if load.adapter is not None else cast_elements(size, load)
        return load.dtype_bytes * (count - stacks) if half else 0
    gradient_slice = share(MASTER * count, load, 1) if half else 0
    buffers = 2 if load.kind == "cuda" and load.zero < 3 else 1
    buckets = buffers * bucket_size(count) * load.dtype_bytes
    return gradient_slice + buckets + gathered_bytes(size, load)


def gathered_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of weights that ZeRO-3 gathers: `LIVE` elements, or the largest layer if it has more.

    A module's weights are gathered together, and an expert layer of a large MoE model can exceed `LIVE`. A quantized
    base is not partitioned.
    """
    if load.zero < 3 or load.quantized_bits is not None:
        return 0
    return min(size.total, max(LIVE, size.largest_layer)) * load.dtype_bytes


def bucket_size(trained: int | None) -> int:
    """Return the elements of a communication bucket: the number of gradients, up to `BUCKET`.

    DeepSpeed allocates the whole bucket even for fewer gradients (`setup_buckets` in `stage_1_and_2.py`).

    Args:
        trained: parameters with a gradient, or None if unknown.
    """
    if trained is None:
        return BUCKET
    return min(-(-max(trained, 1) // BUCKET_UNIT) * BUCKET_UNIT, BUCKET)
