"""What a job's workers ask of Ray's nodes (`finetune_api.slots`)."""

from __future__ import annotations

from finetune_api.slots import SLOT


def asked() -> dict[str, float]:
    """Return what each worker asks of its node: a place; on one machine nothing, where none is counted."""
    import ray

    return {SLOT: 1.0} if SLOT in ray.cluster_resources() else {}
