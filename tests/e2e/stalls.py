"""What makes the workers of a job hang on real pods: each one as something that is done to it, and undone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cgroups
import psutil
from cluster_jobs import long_job
from faults import WORKER, Victim

Json = dict[str, Any]
Undo = Callable[[], None]
TIMEOUT = 20
"""`runPolicy.stallTimeout` of the job, in seconds."""
_NOWHERE = "02:00:00:00:00:01"
"""A hardware address that no interface has."""


def stall_job(name: str, template: Json, *, steps: int, save: int) -> Json:
    """A long job of two pods whose rows are loaded by processes of their own."""
    body = long_job(name, template, steps=steps, save=save)
    body["spec"]["stages"][1]["pretrain"]["dataloaderNumWorkers"] = 1
    body["spec"]["runPolicy"] = {"stallTimeout": TIMEOUT}
    # A node has room for both pods: the one that is avoided may be the node of either.
    body["spec"]["resources"] |= {"memoryPerNode": "5Gi", "cpusPerNode": "500m"}
    return body


def stopped_worker(victim: Victim) -> Undo:
    """SIGSTOP of one worker. It is ended, so nothing is to be undone."""
    os.kill(_worker(victim), signal.SIGSTOP)
    return _nothing


def sleeping_loader(victim: Victim) -> Undo:
    """The process that loads a worker's rows sleeps."""
    worker = _worker(victim)
    for child in psutil.Process(worker).children():
        os.kill(child.pid, signal.SIGSTOP)
    return _nothing


def hanging_store(victim: Victim) -> Undo:
    """The store accepts connections and answers none."""
    server = victim.s3.process
    server.suspend()
    return server.resume


def dead_network(victim: Victim) -> Undo:
    """No packet gets from one pod of the attempt to the other one; both reach everything else."""
    pods = victim.pods()
    other = pods[1]["status"]["podIP"]
    pid = _processes(pods[0], "finetune")[0]
    # The entry goes with the pod's network namespace, and the attempt's pods go as it ends.
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "neigh", "replace", other, "lladdr", _NOWHERE]
    subprocess.run([*command, "dev", "eth0", "nud", "permanent"], check=True)
    return _nothing


STALLS: dict[str, Callable[[Victim], Undo]] = {
    "stopped-worker": stopped_worker,
    "sleeping-loader": sleeping_loader,
    "hanging-store": hanging_store,
    "dead-network": dead_network,
}


def _worker(victim: Victim) -> int:
    """A worker of the attempt, by chance; not one of its loaders, which have the same command line."""
    pod = victim.chance.choice(victim.pods())
    found = _processes(pod, WORKER)
    return next(pid for pid in found if psutil.Process(pid).ppid() not in found)


def _processes(pod: Json, words: str) -> list[int]:
    pids = cgroups.processes(pod["metadata"]["uid"])
    found = [pid for pid in pids if words in cgroups.command_of(pid) and Path(f"/proc/{pid}").exists()]
    assert found, f"no process {words!r} in pod {pod['metadata']['name']}"
    return found


def _nothing() -> None:
    """Nothing is left of it."""
