"""Reports NCCL's transport between the nodes of a job, which it reads from NCCL's log after the first step."""

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

_SUFFICIENT_LEVELS = ("INFO", "TRACE")


def log_file(environment: Mapping[str, str]) -> Path | None:
    """Return the path of this process's NCCL log; None if NCCL writes none, or at a level without the transport."""
    name = environment.get(NCCL_LOG_FILE)
    if not name or environment.get(NCCL_LOG_LEVEL, "").upper() not in _SUFFICIENT_LEVELS:
        return None
    return Path(name.replace("%h", socket.gethostname()).replace("%p", str(os.getpid())))


def read_transport() -> Transport:
    """Return the transport in this process's NCCL log; empty if there is no log."""
    path = log_file(os.environ)
    try:
        with open(path or os.devnull, errors="replace") as lines:
            return parse_log(lines)
    except OSError:
        return Transport()


def slow_network(found: Transport, job: FineTuneJob, fabric: Fabric) -> str:
    """Return a warning if a job that has, or requests, RDMA devices uses TCP; otherwise an empty text.

    Args:
        found: the transport.
        job: the job.
        fabric: fabric of a node whose worker uses TCP.
    """
    if found.network != SOCKET or not (job_needs(job, 0).rdma or fabric.devices):
        return ""
    why = f" ({'; '.join(found.reasons)})" if found.reasons else ""
    rdma = "requests RDMA devices" if job_needs(job, 0).rdma else f"has RDMA devices ({', '.join(fabric.devices)})"
    return (
        f"NCCL uses TCP between nodes{why}, though the job {rdma}: training is several times slower. {_remedy(fabric)}"
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
            "There is no /dev/infiniband/uverbs* in the container: request the device plugin's resource in "
            "resources.podTemplate (such as rdma/hca: 1), and its network by the annotation "
            "k8s.v1.cni.cncf.io/networks"
        )
    return "Check NCCL_IB_HCA and NCCL_SOCKET_IFNAME, and whether the adapter's port is up (docs/gpu.md)"


class TransportCallback(TrainerCallback):
    """Reads the log once, after the first step, when NCCL has opened all connections of a step.

    Args:
        collectives: collectives of the workers.
        job: the job.
        report: receives the transport and a warning, which may be empty.
    """

    def __init__(self, collectives: Collectives, job: FineTuneJob, report: Callable[[Transport, str], None]) -> None:
        self.collectives, self.job, self.report = collectives, job, report
        self.done = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.done:
            return
        self.done = True
        own = read_transport()
        found = self.collectives.gather((own, slow_network(own, self.job, fabric_facts())))
        transport = joined(one for one, _ in found)
        if transport != Transport():
            self.report(transport, next((warning for _, warning in found if warning), ""))
