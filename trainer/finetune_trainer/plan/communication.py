"""Memory of what workers exchange: DeepSpeed's and DDP's buckets, gathered weights, NCCL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.plan.expert_copies import cast_elements
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.states import MASTER, share, trainable

if TYPE_CHECKING:
    from finetune_trainer.plan.memory import Workload

BUCKET = 500_000_000
"""Most elements of DeepSpeed's reduce and all-gather buckets, its defaults."""
BUCKET_UNIT = 1 << 16
"""A bucket is a multiple of so many elements: DeepSpeed wants a multiple of its NCCL alignment, which is 2."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 gathers ahead at most (`stage3_max_live_parameters`), its default."""
NCCL_CHANNELS = 24
"""Channels of an NCCL communicator over NVLink."""
NCCL_CONNECTION = (4 << 20) + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
"""Bytes of one connection's buffers in NCCL 2.29: `Simple` has 4 MiB (`NCCL_BUFFSIZE`), `LL128` 120 elements of 8 bytes
for each of 640 threads in 8 steps, `LL` 8 lines of 16 bytes for each of 512 threads in 8 steps."""


def nccl_bytes(load: Workload) -> int:
    """Return the bytes of NCCL's buffers: a ring and a tree, each with a connection for every channel."""
    return 2 * NCCL_CHANNELS * NCCL_CONNECTION if load.kind == "cuda" and load.workers > 1 else 0


def buffer_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of copies and buckets.

    ZeRO-0: autocast's half-precision weights (experts have a part of their own); gradients are views of DDP's
    buckets. ZeRO-1 to 3: a bucket of gradients in their own format, two where communication overlaps with computation
    (`setup_buckets` in `stage_1_and_2.py`; `stage3.py` has one), the float32 copy of the worker's share of the
    gradients, and under ZeRO-3 gathered weights. All-gathers of ZeRO-1 and 2 write into the weights themselves,
    whatever `allgather_bucket_size` is (`all_gather_dp_groups`).
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
    """Return the bytes of weights that ZeRO-3 has gathered: `LIVE` elements, or one layer where it is larger.

    A module's own weights are gathered together, and an expert layer of a large mixture has more than `LIVE`. A
    quantized base is not divided.
    """
    if load.zero < 3 or load.quantized_bits is not None:
        return 0
    return min(size.total, max(LIVE, size.largest_layer)) * load.dtype_bytes


def bucket_size(trained: int | None) -> int:
    """Return the elements of a communication bucket: no more than there are gradients.

    DeepSpeed allocates a bucket in full, whatever is trained (`stage_1_and_2.py`, `setup_buckets`).

    Args:
        trained: parameters with a gradient; None where unknown.
    """
    if trained is None:
        return BUCKET
    return min(-(-max(trained, 1) // BUCKET_UNIT) * BUCKET_UNIT, BUCKET)
