"""The role of a pod in its job's Ray cluster: head or worker node, and the options of `ray start`.

In an Indexed Job, the pod with completion index 0 is the head. KubeRay generates the `ray start` command of each pod
(`KUBERAY_GEN_RAY_START_CMD`), which contains the role and the options; the RayJob's annotation
`ray.io/overwrite-container-cmd` makes this program run as the container's process instead of that command.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

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
    """The role of a pod in its attempt."""

    head: bool
    """Whether the pod runs the Ray head and the driver."""
    address: str
    """Host and port of the Ray head."""
    options: tuple[str, ...]
    """Options of `ray start`."""
    watched: bool = False
    """Whether KubeRay manages the cluster: it needs Ray's dashboard, and replaces a head pod that ends."""

    @property
    def environment(self) -> dict[str, str]:
        """Additional environment variables of the `ray start` process."""
        return {WATCHED_VARIABLE: HEAD if self.head else NODE} if self.watched else {}


def node_role(resources: Resources, environment: Mapping[str, str] = os.environ) -> NodeRole:
    """Return the role of this pod from the environment variables that its engine sets."""
    command = environment.get(KUBERAY_VARIABLE)
    if command:
        return _kuberay_role(shlex.split(command)[2:], resources)
    address = environment[HEAD_VARIABLE]
    if int(environment.get(INDEX_VARIABLE, "0")):
        return NodeRole(False, address, (f"--address={address}", *_resource_options(resources)))
    port = address.rpartition(":")[2]
    options = (*_head_options(port), "--include-dashboard=false", *_resource_options(resources))
    return NodeRole(True, f"{_ip()}:{port}", options)


def replaces_nodes(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the engine replaces the lost pod of a worker node."""
    return bool(environment.get(KUBERAY_VARIABLE))


def _kuberay_role(generated: list[str], resources: Resources) -> NodeRole:
    """Return the role with KubeRay's options (`rayStartParams` and its own), the node's resources replaced by ours."""
    own = {_name(option): option for option in _resource_options(resources)}
    kept = tuple(option for option in generated if _name(option) not in {*own, "--block", "--head"})
    if "--head" in generated:
        port = next((option.partition("=")[2] for option in kept if _name(option) == "--port"), GCS_PORT)
        kept = tuple(option for option in kept if _name(option) != "--port")
        return NodeRole(True, f"{_ip()}:{port}", (*_head_options(port), *kept, *own.values()), watched=True)
    address = next(option.partition("=")[2] for option in kept if _name(option) == "--address")
    return NodeRole(False, address, (*kept, *own.values()), watched=True)


def _name(option: str) -> str:
    return option.partition("=")[0]


def _head_options(port: str) -> tuple[str, ...]:
    return "--head", f"--node-ip-address={_ip()}", f"--port={port}"


def _ip() -> str:
    return socket.gethostbyname(socket.gethostname())


def _resource_options(resources: Resources) -> list[str]:
    """Return the options that declare this node's resources.

    They include more CPUs than the node has, because Ray Train's helper actors request CPUs too.
    """
    return [
        f"--num-cpus={max(psutil.cpu_count() or 1, LEAST_CPUS)}",
        f"--num-gpus={resources.gpus_per_node or 0}",
        f"--resources={offered(resources)}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
    ]
