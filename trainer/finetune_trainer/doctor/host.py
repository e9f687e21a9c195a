"""Checks of the machine's limits and of the Hugging Face hub. Pure."""

from __future__ import annotations

from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, State
from finetune_trainer.doctor.needs import Needs
from finetune_trainer.plan.quantities import human_bytes, parse_quantity

SHM_BYTES = 1 << 30
"""NCCL's recommendation for containers (`--shm-size=1g`, NCCL user guide, "Troubleshooting: Shared Memory")."""
OPEN_FILES = 65536
"""Ray's recommendation (docs.ray.io, "Configuring ulimit")."""
CACHE_BYTES = 20 << 30
"""Enough for the download of a model of 8 billion weights in bfloat16 and for prepared data."""


def shared_memory(facts: Facts, needs: Needs) -> Finding:
    """Check the size of /dev/shm, which contains buffers of NCCL and of data loaders."""
    size, name = facts.host.shm_bytes, "/dev/shm"
    found = "none" if size is None else human_bytes(size)
    if needs.gpus < 2:
        return Finding(name, State.NOT_NEEDED, found, "several GPUs of one node")
    if size is not None and size >= SHM_BYTES:
        return Finding(name, State.OK, found, human_bytes(SHM_BYTES))
    remedy = "Raise kubernetes.sharedMemory, or docker run --shm-size"
    state = State.MISSING if not size else State.WARNING
    return Finding(name, state, found, human_bytes(SHM_BYTES), remedy, "kubernetes.sharedMemory")


def open_files(facts: Facts, needs: Needs) -> Finding:
    """Check the limit on open files: each connection of Ray and NCCL uses one."""
    limit, name, needed = facts.host.open_files, "Open files (ulimit -n)", f"{OPEN_FILES:,}"
    if limit is None:
        return Finding(name, State.NOT_NEEDED, "not known", needed)
    if limit >= OPEN_FILES or needs.gpus * needs.nodes < 2:
        return Finding(
            name, State.OK, f"{limit:,}", needed if needs.gpus * needs.nodes > 1 else "no minimum for one worker"
        )
    remedy = "Raise it (ulimit -n), in containers LimitNOFILE of the container runtime"
    return Finding(name, State.WARNING, f"{limit:,}", needed, remedy)


def memory(facts: Facts, needs: Needs) -> Finding:
    """Check the free memory of the machine and its cgroups against the job's request."""
    free, name, field = facts.host.memory_bytes, "Host memory", "resources.memoryPerNode"
    found = "not known" if free is None else f"{human_bytes(free)} free"
    if free is None or needs.memory is None:
        return Finding(name, State.OK if free else State.NOT_NEEDED, found, "what `finetune plan` shows", field=field)
    if free >= parse_quantity(needs.memory):
        return Finding(name, State.OK, found, needs.memory, field=field)
    remedy = "Free memory, raise the container's limit, or lower resources.memoryPerNode"
    return Finding(name, State.WARNING, found, needs.memory, remedy, field)


def cache(facts: Facts, needs: Needs) -> Finding:
    """Check the free disk space for downloads and prepared data."""
    host, needed = facts.host, human_bytes(CACHE_BYTES)
    if host.cache_free_bytes is None:
        return Finding("Cache directory", State.NOT_NEEDED, host.cache or "not known", needed)
    found = f"{human_bytes(host.cache_free_bytes)} free in {host.cache}"
    if host.cache_free_bytes >= CACHE_BYTES:
        return Finding("Cache directory", State.OK, found, needed)
    remedy = "Free disk space, or set FINETUNE_CACHE (on a cluster kubernetes.modelCacheClaim) to a larger disk"
    return Finding("Cache directory", State.WARNING, found, needed, remedy, "kubernetes.modelCacheClaim")


def hub(facts: Facts, needs: Needs) -> Finding:
    """Check that models and data can be downloaded from the hub. A failure is an outage, not an error of the job."""
    name, hub = "Hugging Face hub", facts.hub
    found = (
        "offline (HF_HUB_OFFLINE)"
        if hub.offline
        else (hub.error or f"{hub.endpoint} responds")
        if hub.asked
        else "not asked"
    )
    if not needs.hub:
        return Finding(name, State.NOT_NEEDED, found, "a job that names a hub model or dataset", field="")
    if not hub.offline and not hub.error:
        return Finding(name, State.OK, found, f"{needs.hub} on the hub", field=needs.hub)
    remedy = "Download it to the cache first (HF_HOME), or name a path; HF_ENDPOINT chooses a mirror"
    return Finding(name, State.WARNING, found, f"{needs.hub} on the hub, or in the cache", remedy, needs.hub)
