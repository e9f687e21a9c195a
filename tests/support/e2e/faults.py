"""What can befall a job and its cluster, each as something that is done to them at a given moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support.cluster.access import Access
from support.e2e import cgroups
from support.e2e.clusters import Cluster
from support.e2e.following import Following
from support.e2e.operator_pod import OperatorPod
from support.storage.s3_server import S3Server

from finetune_api.labels import JOB_LABEL, RUN_LABEL

Json = dict[str, Any]
KUBELET_SECONDS, STORE_SECONDS, DISK_SECONDS = 120, 60, 60
SUSPENSIONS = 10
WAIT_SECONDS = 900
WORKER = "ray::RayTrainWorker"


@dataclass
class Victim:
    """A running job and all around it."""

    cluster: Cluster
    admin: Access
    operator: OperatorPod
    s3: S3Server
    namespace: str
    name: str
    following: Following
    chance: random.Random
    engine: str = "job"

    def pods(self) -> list[Json]:
        """Pods of the attempt that is on its way, by index."""
        attempt = self.following.status.get("attempt")
        selector = f"--selector={JOB_LABEL}={self.name},{RUN_LABEL}={attempt}"
        done = self.admin.kubectl("get", "pods", f"--namespace={self.namespace}", selector, "--output=json")
        return sorted(json.loads(done.stdout)["items"], key=lambda pod: str(pod["metadata"]["name"]))

    def kubectl(self, *arguments: str) -> None:
        self.admin.kubectl(*arguments, f"--namespace={self.namespace}")

    def node(self) -> Any:
        """One of the nodes that its pods are on."""
        names = sorted({pod["spec"]["nodeName"] for pod in self.pods() if "nodeName" in pod["spec"]})
        chosen = self.chance.choice(names)
        return next(node for node in self.cluster.nodes if node.name == chosen)

    def goes_on(self, since: float) -> None:
        """Wait until there is a step by a process that began after that."""
        self.following.until(lambda it: (found := it.recovery(since)) is not None and found.broken, WAIT_SECONDS,
                             "training goes on")  # fmt: skip


Strike = Callable[[Victim], None]


def worker_process(victim: Victim) -> None:
    """Kill -9 of a worker's process."""
    _kill(_processes(victim, WORKER))


def driver_process(victim: Victim) -> None:
    """Kill -9 of the driver's process."""
    _kill(_processes(victim, "finetune node", pods=1))


def pod(victim: Victim) -> None:
    """A pod is deleted without any grace."""
    name = victim.chance.choice(victim.pods())["metadata"]["name"]
    victim.kubectl("delete", "pod", name, "--grace-period=0", "--force")


def operator(victim: Victim) -> None:
    """Kill -9 of the operator."""
    victim.operator.kill()


def run_deleted(victim: Victim) -> None:
    """The attempt's Job or RayJob is deleted."""
    kind = {"job": "job", "kuberay": "rayjob"}[victim.engine]
    victim.kubectl("delete", kind, f"{victim.name}-{victim.following.status['attempt']}", "--wait=false")


def kubelet_stopped(victim: Victim) -> None:
    """A kubelet is away for two minutes; pods run on."""
    node = victim.node()
    node.stop_kubelet()
    time.sleep(KUBELET_SECONDS)
    node.start_kubelet()


def node_drained(victim: Victim) -> None:
    """A node is drained, as for an upgrade; it takes pods again once the job has gone on."""
    struck, node = time.monotonic(), victim.node()
    options = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s"]
    victim.admin.kubectl("drain", node.name, *options)
    victim.goes_on(struck)
    victim.admin.kubectl("uncordon", node.name)


def node_lost(victim: Victim) -> None:
    """A node's power fails; it comes back once the job has gone on elsewhere."""
    struck, node = time.monotonic(), victim.node()
    node.lose()
    try:
        victim.goes_on(struck)
    finally:
        node.bring_back()


def apiserver(victim: Victim) -> None:
    """The API server is killed and starts again."""
    victim.cluster.restart_apiserver()


def store_stopped(victim: Victim) -> None:
    """S3 is away for a minute, from the middle of a save on where one can be caught."""
    seen = victim.following.samples[-1].step
    victim.following.until(lambda it: it.samples[-1].step > seen and _saving(victim), 120, "a save")
    victim.s3.stop()
    time.sleep(STORE_SECONDS)
    victim.s3.start()


def disk_full(victim: Victim) -> None:
    """Not a byte is left on a node's disk for a minute."""
    node = victim.node()
    node.fill_disk()
    time.sleep(DISK_SECONDS)
    node.free_disk()


def suspended(victim: Victim) -> None:
    """Suspended and resumed, ten times."""
    for _ in range(SUSPENSIONS):
        _suspend(victim, True)
        victim.following.until(lambda it: it.status.get("phase") == "Suspended", WAIT_SECONDS, "suspended")
        resumed = time.monotonic()
        _suspend(victim, False)
        victim.goes_on(resumed)


def out_of_memory(victim: Victim) -> None:
    """A worker's container is at its memory limit, and the kernel kills its largest process."""
    cgroups.exhaust_memory(_processes(victim, WORKER)[0])


KINDS: dict[str, Strike] = {
    "worker": worker_process,
    "driver": driver_process,
    "pod": pod,
    "operator": operator,
    "run-deleted": run_deleted,
    "kubelet": kubelet_stopped,
    "drain": node_drained,
    "node-lost": node_lost,
    "apiserver": apiserver,
    "store": store_stopped,
    "disk-full": disk_full,
    "suspend": suspended,
    "memory": out_of_memory,
}

BREAKING = ("worker", "driver", "pod", "run-deleted", "drain", "node-lost", "suspend", "memory")
"""After these training has to start again."""


def _suspend(victim: Victim, wanted: bool) -> None:
    patch = json.dumps({"spec": {"runPolicy": {"suspend": wanted}}})
    victim.kubectl("patch", "finetunejob", victim.name, "--type=merge", f"--patch={patch}")


def _saving(victim: Victim) -> bool:
    """Whether a checkpoint in the store has no manifest yet."""
    root = f"models/runs/{victim.namespace}/{victim.name}/stages/01-pretrain/checkpoints"
    victim.s3.fs.invalidate_cache()
    files = victim.s3.fs.find(root)
    seen = {file.removeprefix(root + "/").partition("/")[0] for file in files}
    whole = {file.split("/")[-2] for file in files if file.endswith("/manifest.json")}
    return bool(seen - whole)


def _processes(victim: Victim, words: str, pods: int | None = None) -> list[int]:
    """Those of one pod, by chance, among the first so many; waits for them where an attempt is still starting."""
    found: list[list[int]] = []

    def there(_: Following) -> bool:
        ids = (cgroups.processes(pod["metadata"]["uid"]) for pod in victim.pods()[:pods])
        found[:] = [[pid for pid in pids if words in cgroups.command_of(pid)] for pids in ids]
        return any(found)

    victim.following.until(there, WAIT_SECONDS, f"a process {words!r}")
    return victim.chance.choice([pids for pids in found if pids])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # its parent's end was its own
            os.kill(pid, signal.SIGKILL)
