"""Estimate the size of a checkpoint and the time to write it, which the grace period of a pod must allow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.plan.states import MASTER, MOMENTS, trainable

WRITE_BYTES_PER_SECOND = 200e6
"""Assumed write speed if it was not measured: an NFS share or one stream to S3 writes about 200 MB/s."""
MARGIN = 1.5
"""Factor on the estimated time: the current step ends before the save, and storage can be slower."""
ROUND_SECONDS = 60


@dataclass(frozen=True)
class Saving:
    """Size and write time of a job's largest checkpoint."""

    size: int
    """Bytes of the whole checkpoint."""
    node: int
    """Maximum bytes that one node writes."""
    seconds: float
    """Time to write `node` bytes."""
    bytes_per_second: float
    measured: bool
    """Whether `bytes_per_second` was measured; else it is `WRITE_BYTES_PER_SECOND`."""


def checkpoint_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of a checkpoint: weights and AdamW's states, which depend on the ZeRO stage.

    - ZeRO-0: the trained weights in float32 and their two float32 moments. Frozen weights are saved only with full
      training of a composite model.
    - ZeRO-1 and 2: DeepSpeed's module states in the compute dtype, and a float32 master copy and two moments of each
      trained weight. Frozen weights are saved except the base of a PEFT model.
    - ZeRO-3: the same without module states of the trained weights.
    """
    trained, dtype = trainable(size, load), load.dtype_bytes
    frozen = 0 if load.adapter is not None else size.total - trained
    if load.zero == 0:
        kept = 0 if load.tuned is not None else frozen * dtype
        return trained * (MASTER + MOMENTS) + kept
    states = trained * (MASTER + MOMENTS) + frozen * dtype
    return states if load.zero == 3 else states + trained * dtype


def node_bytes(total: int, zero: int, nodes: int) -> int:
    """Return the maximum bytes that one node writes: at ZeRO-0 rank 0 writes all, else every worker its partition."""
    return total if zero == 0 else -(-total // max(nodes, 1))


def saving(sizes: list[tuple[int, int]], nodes: int, bytes_per_second: float | None) -> Saving | None:
    """Return the slowest checkpoint of a job's stages, or None if no stage saves any.

    Args:
        sizes: checkpoint bytes and ZeRO stage of each stage.
        bytes_per_second: measured write speed, or None.
    """
    speed = bytes_per_second or WRITE_BYTES_PER_SECOND
    whole = [(node_bytes(total, zero, nodes), total) for total, zero in sizes if total]
    if not whole:
        return None
    node, total = max(whole)
    return Saving(total, node, node / speed, speed, bytes_per_second is not None)


def grace_seconds(found: Saving) -> int:
    """Return a sufficient grace period in seconds, in whole minutes."""
    return math.ceil(found.seconds * MARGIN / ROUND_SECONDS + 1) * ROUND_SECONDS


def grace_warning(found: Saving, grace: int) -> str:
    """Return a warning if a checkpoint takes longer than the grace period of `grace` seconds, else an empty string."""
    if found.seconds <= grace:
        return ""
    how = "measured" if found.measured else "assumed, the store was not measured"
    share = f" (of which one node writes {human_bytes(found.node)})" if found.node < found.size else ""
    return (
        f"kubernetes.checkpointGraceSeconds: is {grace}, but a checkpoint of {human_bytes(found.size)}{share} takes "
        f"about {found.seconds:.0f} s at {found.bytes_per_second / 1e6:.0f} MB/s ({how}): a pod that is stopped would "
        f"lose its last steps. Set it to {grace_seconds(found)}"
    )


def saving_words(found: Saving) -> str:
    """Return the checkpoint's size and write time in one line."""
    how = "measured" if found.measured else "assumed"
    return (
        f"{human_bytes(found.size)}, which one node writes in about {found.seconds:.0f} s at "
        f"{found.bytes_per_second / 1e6:.0f} MB/s ({how})"
    )
