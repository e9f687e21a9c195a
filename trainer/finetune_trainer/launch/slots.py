"""How many of a job's workers each node takes: a resource of our own that Ray counts.

A node of the engine `job` offers Ray more CPUs than it has, so that its helpers always find one. Without this, Ray
would put all workers of a job without GPUs on the first node that is there.
"""

from __future__ import annotations

import json

from finetune_api.cluster import Resources

SLOT = "finetune_worker"


def workers_per_node(resources: Resources, gpus: int | None = None) -> int:
    """One for each GPU of a node; without GPUs as many as the job says.

    Args:
        gpus: a node's. Default: those that the job names.
    """
    return (resources.gpus_per_node if gpus is None else gpus) or resources.workers_per_node or 1


def offered(resources: Resources) -> str:
    """What a node offers, as `ray start --resources` takes it."""
    return json.dumps({SLOT: workers_per_node(resources)})


def asked() -> dict[str, float]:
    """What each worker asks of its node. Nothing where nodes don't count: on one machine, and on KubeRay's, which offer
    the CPUs of their containers."""
    import ray

    return {SLOT: 1.0} if SLOT in ray.cluster_resources() else {}
