"""Checks of the requirements of RDMA between nodes. Pure.

If one is missing, NCCL falls back to TCP, which only its log (NCCL_DEBUG=INFO) shows.
"""

from __future__ import annotations

from finetune_trainer.doctor.facts import Facts
from finetune_trainer.doctor.finding import Finding, State
from finetune_trainer.doctor.needs import Needs

_SEVERAL = "RDMA between several nodes"


def rdma_devices(facts: Facts, needs: Needs) -> Finding:
    """Check for verbs devices in the container. A device plugin must add the machine's adapters to pods."""
    fabric, name = facts.fabric, "RDMA devices"
    found = ", ".join(fabric.devices) or (
        f"none in this container, {', '.join(fabric.adapters)} on the machine" if fabric.adapters else "none"
    )
    if not _several(needs):
        return Finding(name, State.NOT_NEEDED, found, _SEVERAL)
    if fabric.devices:
        return Finding(name, State.OK, found, "/dev/infiniband/uverbs*")
    remedy = (
        "Install an RDMA device plugin and request its resource in resources.podTemplate limits (such as rdma/hca: 1), "
        "or accept TCP, which is several times slower"
    )
    state = State.MISSING if needs.rdma else State.WARNING
    return Finding(name, state, found, "/dev/infiniband/uverbs*", remedy, "resources.podTemplate")


def locked_memory(facts: Facts, needs: Needs) -> Finding:
    """Check that RDMA can pin its buffers: RLIMIT_MEMLOCK is unlimited, or CAP_IPC_LOCK is in effect.

    For a container that does not run as root, Kubernetes adds capabilities only to the bounding set, where they have no
    effect. The limit is that of containerd.
    """
    fabric, name, needed = facts.fabric, "Locked memory", "RLIMIT_MEMLOCK unlimited, or CAP_IPC_LOCK in effect"
    limit = "unlimited" if fabric.locked_bytes is None else f"{fabric.locked_bytes / 1024:.0f} KiB"
    found = f"{limit}, CAP_IPC_LOCK {'' if fabric.ipc_lock else 'not '}in effect"
    if not _several(needs) or not (fabric.devices or needs.rdma):
        return Finding(name, State.NOT_NEEDED, found, _SEVERAL)
    if fabric.locked_bytes is None or fabric.ipc_lock:
        return Finding(name, State.OK, found, needed)
    remedy = "Set LimitMEMLOCK=infinity for the containerd service of the node (IPC_LOCK has no effect without root)"
    return Finding(name, State.WARNING, found, needed, remedy, "resources.podTemplate")


def peer_memory(facts: Facts, needs: Needs) -> Finding:
    """Check for GPUDirect RDMA, by which the adapter reads GPU memory: nvidia-peermem or DMA-BUF (open module)."""
    name, needed = "GPUDirect RDMA", "the kernel module nvidia-peermem, or NVIDIA's open kernel module (DMA-BUF)"
    ways = {"nvidia-peermem": facts.fabric.peer_memory, "open kernel module": facts.driver.open_module}
    found = ", ".join(way for way, present in ways.items() if present) or "none"
    if not _several(needs) or not facts.fabric.devices:
        return Finding(name, State.NOT_NEEDED, found, _SEVERAL)
    if any(ways.values()):
        return Finding(name, State.OK, found, needed)
    remedy = "Load nvidia-peermem on the node (modprobe nvidia-peermem), or install the open kernel module"
    return Finding(name, State.WARNING, found, needed, remedy, "resources.podTemplate")


def _several(needs: Needs) -> bool:
    return bool(needs.gpus) and needs.nodes > 1
