"""NCCL's transport between the nodes of a job: read its log after the first step, and report what it says."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.job import FineTuneJob
from finetune_trainer.doctor.facts import Fabric
from finetune_trainer.doctor.gather import fabric_facts
from finetune_trainer.doctor.nccl_log import SOCKET, Transport, joined, parse_log
from finetune_trainer.doctor.needs import job_needs
from finetune_trainer.runtime import NCCL_LOG_FILE, NCCL_LOG_LEVEL
from finetune_trainer.training.collectives import Collectives

_TELLING = ("INFO", "TRACE")


def log_file(environment: Mapping[str, str]) -> Path | None:
    """Return the log of this process; None where NCCL writes none to a file, or less than is needed."""
    name = environment.get(NCCL_LOG_FILE)
    if not name or environment.get(NCCL_LOG_LEVEL, "").upper() not in _TELLING:
        return None
    return Path(name.replace("%h", socket.gethostname()).replace("%p", str(os.getpid())))


def transport_here() -> Transport:
    """Return what this process's log says; nothing where there is no log."""
    path = log_file(os.environ)
    try:
        with open(path or os.devnull, errors="replace") as lines:
            return parse_log(lines)
    except OSError:
        return Transport()


def slow_network(found: Transport, job: FineTuneJob, fabric: Fabric) -> str:
    """Return a warning where a job that has, or asks for, RDMA devices runs on TCP; empty otherwise.

    Args:
        fabric: of a node whose worker uses TCP.
    """
    if found.network != SOCKET or not (job_needs(job, 0).rdma or fabric.devices):
        return ""
    why = f" ({'; '.join(found.reasons)})" if found.reasons else ""
    asked = "asks for RDMA devices" if job_needs(job, 0).rdma else f"has RDMA devices ({', '.join(fabric.devices)})"
    return (
        f"NCCL uses TCP between nodes{why}, though the job {asked}: training is several times slower. {_remedy(fabric)}"
    )


def _remedy(fabric: Fabric) -> str:
    if fabric.locked_bytes is not None and not fabric.ipc_lock:
        return (
            f"Locked memory is limited to {fabric.locked_bytes / 1024:.0f} KiB (RLIMIT_MEMLOCK) and CAP_IPC_LOCK is "
            "not in effect: set LimitMEMLOCK=infinity for containerd on the nodes (docs/gpu.md); the capability "
            "IPC_LOCK in resources.podTemplate has no effect without root"
        )
    if not fabric.devices:
        return (
            "There is no /dev/infiniband/uverbs* in the container: ask for the device plugin's resource in "
            "resources.podTemplate (such as rdma/hca: 1), and for its network by the annotation "
            "k8s.v1.cni.cncf.io/networks"
        )
    return "Look at NCCL_IB_HCA and NCCL_SOCKET_IFNAME, and whether the adapter's port is up (docs/gpu.md)"


class TransportCallback(TrainerCallback):
    """Reads the log once, after the first step, when all connections of a step are made.

    Args:
        tell: called on the first worker with the transport and a warning, which may be empty.
    """

    def __init__(self, collectives: Collectives, job: FineTuneJob, tell: Callable[[Transport, str], None]) -> None:
        self.collectives, self.job, self.tell = collectives, job, tell
        self.done = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.done:
            return
        self.done = True
        mine = transport_here()
        found = self.collectives.gather((mine, slow_network(mine, self.job, fabric_facts())))
        transport = joined(one for one, _ in found)
        if transport != Transport():
            self.tell(transport, next((warning for _, warning in found if warning), ""))
