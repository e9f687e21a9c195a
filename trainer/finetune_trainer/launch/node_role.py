"""The place of a pod in its job's Ray cluster: head or not, and how Ray starts there.

Two engines make the pods. In an Indexed Job the pod's completion index says which one is the head. KubeRay gives each
pod the `ray start` command that it would run itself (`KUBERAY_GEN_RAY_START_CMD`), which says all of it: the RayJob's
annotation `ray.io/overwrite-container-cmd` lets this program be the container's process in its place.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from finetune_api.cluster import Resources
from finetune_api.slots import LEAST_CPUS, offered
from finetune_trainer.forks.start import HEAD, NODE, WATCHED_VARIABLE

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
HEAD_VARIABLE = "FINETUNE_HEAD_ADDRESS"
KUBERAY_VARIABLE = "KUBERAY_GEN_RAY_START_CMD"
OBJECT_STORE_BYTES = 256 * 2**20
GCS_PORT = "6379"


@dataclass(frozen=True)
class NodeRole:
    """What a pod does in its attempt."""

    head: bool
    """Whether it runs the Ray head and the driver."""
    address: str
    """Host and port of the Ray head."""
    options: tuple[str, ...]
    """Options of `ray start`."""
    watched: bool = False
    """Whether KubeRay watches the cluster: it wants Ray's dashboard, and replaces a head that ends by itself."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the `ray start` process beside those of this one."""
        return {WATCHED_VARIABLE: HEAD if self.head else NODE} if self.watched else {}


def node_role(resources: Resources, environment: Mapping[str, str] = os.environ) -> NodeRole:
    """Return this pod's place, from what its engine says in the environment."""
    command = environment.get(KUBERAY_VARIABLE)
    if command:
        return _of_kuberay(shlex.split(command)[2:], resources)
    address = environment[HEAD_VARIABLE]
    if int(environment.get(INDEX_VARIABLE, "0")):
        return NodeRole(False, address, (f"--address={address}", *_share(resources)))
    port = address.rpartition(":")[2]
    return NodeRole(True, f"{_ip()}:{port}", (*_head(port), "--include-dashboard=false", *_share(resources)))


def replaces_nodes(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the engine makes a new pod where a worker's pod is lost."""
    return bool(environment.get(KUBERAY_VARIABLE))


def _of_kuberay(given: list[str], resources: Resources) -> NodeRole:
    """KubeRay's options (`rayStartParams` and its own), with what only the node knows in place of theirs."""
    own = {_name(option): option for option in _share(resources)}
    kept = tuple(option for option in given if _name(option) not in {*own, "--block", "--head"})
    if "--head" in given:
        port = next((option.partition("=")[2] for option in kept if _name(option) == "--port"), GCS_PORT)
        kept = tuple(option for option in kept if _name(option) != "--port")
        return NodeRole(True, f"{_ip()}:{port}", (*_head(port), *kept, *own.values()), watched=True)
    address = next(option.partition("=")[2] for option in kept if _name(option) == "--address")
    return NodeRole(False, address, (*kept, *own.values()), watched=True)


def _name(option: str) -> str:
    return option.partition("=")[0]


def _head(port: str) -> tuple[str, ...]:
    return "--head", f"--node-ip-address={_ip()}", f"--port={port}"


def _ip() -> str:
    return socket.gethostbyname(socket.gethostname())


def _share(resources: Resources) -> list[str]:
    """What this node offers: more CPUs than it has, which Ray Train's helpers ask for too, and places for workers."""
    return [
        f"--num-cpus={max(psutil.cpu_count() or 1, LEAST_CPUS)}",
        f"--num-gpus={resources.gpus_per_node or 0}",
        f"--resources={offered(resources)}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]
