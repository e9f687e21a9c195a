"""What a checkpoint takes: bytes, and the time in which a node that is to stop must write them (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_trainer.plan.memory import Workload
from finetune_trainer.plan.model_size import ModelSize
from finetune_trainer.plan.quantities import human_bytes
from finetune_trainer.plan.states import MASTER, MOMENTS, trainable

WRITE_BYTES_PER_SECOND = 200e6
"""Assumed of a store that was not measured: an NFS share or one stream to S3 writes about 200 MB/s."""
MARGIN = 1.5
"""How much longer a save may take than it should: the step under way ends first, and stores slow down."""
ROUND_SECONDS = 60


@dataclass(frozen=True)
class Saving:
    """The largest checkpoint of a job. Sizes in bytes."""

    size: int
    """Of the whole checkpoint."""
    node: int
    """The most that one node writes."""
    seconds: float
    """How long that takes."""
    bytes_per_second: float
    measured: bool
    """Whether the store's speed was measured; else it is `WRITE_BYTES_PER_SECOND`."""


def checkpoint_bytes(size: ModelSize, load: Workload) -> int:
    """Return the bytes of a checkpoint: weights and AdamW's states, by the files that each ZeRO stage writes.

    - ZeRO-0: the trained weights as float32 (adapters or trained experts alone, where only these train; else the whole
      model), and two float32 moments of each.
    - ZeRO-1 and 2: DeepSpeed's module states in the dtype it computes in, and a float32 master copy and two moments of
      each trained weight. Of a PEFT model the frozen base is left out; of trained experts it is not.
    - ZeRO-3: the same without the module states, which the master copies are; and the frozen weights of a model that is
      not PEFT's.
    """
    trained, dtype = trainable(size, load), load.dtype_bytes
    frozen = 0 if load.adapter is not None else size.total - trained
    if load.zero == 0:
        kept = 0 if load.tuned is not None else frozen * dtype
        return trained * (MASTER + MOMENTS) + kept
    states = trained * (MASTER + MOMENTS) + frozen * dtype
    return states if load.zero == 3 else states + trained * dtype


def node_bytes(total: int, zero: int, nodes: int) -> int:
    """Return the most that one node writes: ZeRO-0's first worker writes all, above it every worker its share."""
    return total if zero == 0 else -(-total // max(nodes, 1))


def saving(sizes: list[tuple[int, int]], nodes: int, bytes_per_second: float | None) -> Saving | None:
    """Return what the slowest checkpoint of a job's stages takes; None where no stage has any.

    Args:
        sizes: of each stage, bytes and ZeRO stage.
        bytes_per_second: as measured; None where it was not.
    """
    speed = bytes_per_second or WRITE_BYTES_PER_SECOND
    whole = [(node_bytes(total, zero, nodes), total) for total, zero in sizes if total]
    if not whole:
        return None
    node, total = max(whole)
    return Saving(total, node, node / speed, speed, bytes_per_second is not None)


def grace_seconds(found: Saving) -> int:
    """Return a grace period that is enough, in whole minutes."""
    return math.ceil(found.seconds * MARGIN / ROUND_SECONDS + 1) * ROUND_SECONDS


def grace_warning(found: Saving, grace: int) -> str:
    """Return what to set where a checkpoint takes longer than a node that is to stop may take; empty where it fits."""
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
    """Return the checkpoint in one line, with the time that one node needs for all of it."""
    how = "measured" if found.measured else "assumed"
    return (
        f"{human_bytes(found.size)}, which one node writes in about {found.seconds:.0f} s at "
        f"{found.bytes_per_second / 1e6:.0f} MB/s ({how})"
    )
