"""Ray resources that a worker requests (`finetune_api.slots`)."""

from __future__ import annotations

from finetune_api.slots import SLOT


def asked() -> dict[str, float]:
    """Return the custom resources of a worker: one slot, or nothing if the nodes declare no slots."""
    import ray

    slots = SLOT in ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no type for it
    return {SLOT: 1.0} if slots else {}
