"""Faults of a job and its cluster, each as a function that injects it at once."""

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
    """A running job with its cluster and store."""

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
        """Return the pods of the current attempt by index."""
        attempt = self.following.status.get("attempt")
        selector = f"--selector={JOB_LABEL}={self.name},{RUN_LABEL}={attempt}"
        done = self.admin.kubectl("get", "pods", f"--namespace={self.namespace}", selector, "--output=json")
        return sorted(json.loads(done.stdout)["items"], key=lambda pod: str(pod["metadata"]["name"]))

    def kubectl(self, *arguments: str) -> None:
        self.admin.kubectl(*arguments, f"--namespace={self.namespace}")

    def node(self) -> Any:
        """Return one of the nodes of its pods."""
        names = sorted({pod["spec"]["nodeName"] for pod in self.pods() if "nodeName" in pod["spec"]})
        chosen = self.chance.choice(names)
        return next(node for node in self.cluster.nodes if node.name == chosen)

    def goes_on(self, since: float) -> None:
        """Wait until a process that began after `since` has made a step."""
        self.following.until(lambda it: (found := it.recovery(since)) is not None and found.broken, WAIT_SECONDS,
                             "training goes on")  # fmt: skip


Strike = Callable[[Victim], None]


def worker_process(victim: Victim) -> None:
    """Kill a worker's process with SIGKILL."""
    _kill(_processes(victim, WORKER))


def driver_process(victim: Victim) -> None:
    """Kill the driver's process with SIGKILL."""
    _kill(_processes(victim, "finetune node", pods=1))


def pod(victim: Victim) -> None:
    """Delete a pod without a grace period."""
    name = victim.chance.choice(victim.pods())["metadata"]["name"]
    victim.kubectl("delete", "pod", name, "--grace-period=0", "--force")


def operator(victim: Victim) -> None:
    """Kill the operator with SIGKILL."""
    victim.operator.kill()


def run_deleted(victim: Victim) -> None:
    """Delete the Job or RayJob of the attempt."""
    kind = {"job": "job", "kuberay": "rayjob"}[victim.engine]
    victim.kubectl("delete", kind, f"{victim.name}-{victim.following.status['attempt']}", "--wait=false")


def kubelet_stopped(victim: Victim) -> None:
    """Stop a kubelet for two minutes, while its pods continue to run."""
    node = victim.node()
    node.stop_kubelet()
    time.sleep(KUBELET_SECONDS)
    node.start_kubelet()


def node_drained(victim: Victim) -> None:
    """Drain a node, as for an upgrade, and make it schedulable again once training continues."""
    struck, node = time.monotonic(), victim.node()
    options = ["--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=100s"]
    victim.admin.kubectl("drain", node.name, *options)
    victim.goes_on(struck)
    victim.admin.kubectl("uncordon", node.name)


def node_lost(victim: Victim) -> None:
    """Cut the power of a node, and start it again once training continues elsewhere."""
    struck, node = time.monotonic(), victim.node()
    node.lose()
    try:
        victim.goes_on(struck)
    finally:
        node.bring_back()


def apiserver(victim: Victim) -> None:
    """Kill the API server and start it again."""
    victim.cluster.restart_apiserver()


def store_stopped(victim: Victim) -> None:
    """Stop S3 for a minute, during a save if one is in progress."""
    seen = victim.following.samples[-1].step
    victim.following.until(lambda it: it.samples[-1].step > seen and _saving(victim), 120, "a save")
    victim.s3.stop()
    time.sleep(STORE_SECONDS)
    victim.s3.start()


def disk_full(victim: Victim) -> None:
    """Fill a node's disk completely for a minute."""
    node = victim.node()
    node.fill_disk()
    time.sleep(DISK_SECONDS)
    node.free_disk()


def suspended(victim: Victim) -> None:
    """Suspend and resume the job ten times."""
    for _ in range(SUSPENSIONS):
        _suspend(victim, True)
        victim.following.until(lambda it: it.status.get("phase") == "Suspended", WAIT_SECONDS, "suspended")
        resumed = time.monotonic()
        _suspend(victim, False)
        victim.goes_on(resumed)


def out_of_memory(victim: Victim) -> None:
    """Fill a worker's container to its memory limit, so that the kernel kills its largest process."""
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
"""Faults after which training must start again."""


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
    """Return the matching processes of a random pod among the first `pods`; wait until there are any."""
    found: list[list[int]] = []

    def there(_: Following) -> bool:
        ids = (cgroups.processes(pod["metadata"]["uid"]) for pod in victim.pods()[:pods])
        found[:] = [[pid for pid in pids if words in cgroups.command_of(pid)] for pids in ids]
        return any(found)

    victim.following.until(there, WAIT_SECONDS, f"a process {words!r}")
    return victim.chance.choice([pids for pids in found if pids])


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it ended with its parent
            os.kill(pid, signal.SIGKILL)
