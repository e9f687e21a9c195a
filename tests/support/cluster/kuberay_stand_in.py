"""A stand-in of KubeRay 1.7.0 that reconciles and rejects RayJobs as observed on a real cluster.

The sources are `ray-operator/controllers/ray/{rayjob,raycluster}_controller.go` and observations with two real
kubelets: the finalizer of a RayJob is removed only after KubeRay reached Ray (for which it reads the Secret with the
token, as long as there is a RayCluster). A lost head is replaced and receives the job again, unless an annotation
prevents it. The head Service's ports are those of the first container, and `dashboard` must be one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException

Json = dict[str, Any]
FINALIZER = "ray.io/rayjob-finalizer"
NO_NEW_HEAD = "ray.io/disable-provisioned-head-restart"
WAIT = "wait-gcs-ready"
PAUSE_SECONDS = 0.1
"""Seconds between two looks; KubeRay reconciles each RayJob every 3 s."""
OVER = ("Succeeded", "Failed")


class KubeRayStandIn:
    """A context manager that reconciles the RayJobs of one namespace; their pods need a kubelet.

    Args:
        away: KubeRay's operator does not run, so RayJobs are not reconciled.
    """

    def __init__(self, api: client.ApiClient, namespace: str, *, away: bool = False) -> None:
        self.core, self.custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self.namespace, self.away = namespace, away
        self.submissions: defaultdict[str, int] = defaultdict(int)
        """Number of submissions of each RayJob's entrypoint."""
        self.errors: defaultdict[str, set[str]] = defaultdict(set)
        """Errors that KubeRay writes only to its log."""
        self._submitted_to: dict[str, str] = {}
        self._ends: dict[str, Json] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> KubeRayStandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for job in self._list("rayjobs"):  # the stand-in must remove the finalizers before it stops
            with contextlib.suppress(ApiException):
                self._patch(job["metadata"]["name"], {"metadata": {"finalizers": None}})
        if self._error is not None:
            raise self._error

    def finish(self, name: str, code: int = 0, log: str = "") -> None:
        """End the entrypoint of a RayJob. A negative code is a signal, as in Ray's reports."""
        message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated):\n{log}"
        status = {"jobStatus": "FAILED" if code else "SUCCEEDED", "message": message if code else "Job finished"}
        self._ends[name] = status | {"jobDeploymentStatus": "Failed" if code else "Complete"}

    def _run(self) -> None:
        try:
            while not self._over.wait(PAUSE_SECONDS):
                for job in self._list("rayjobs") if not self.away else []:
                    with contextlib.suppress(ApiException):  # it has changed or is gone, and the next loop sees that
                        self._reconcile(job)
        except BaseException as error:
            self._error = error

    def _reconcile(self, job: Json) -> None:
        name, status = job["metadata"]["name"], job.get("status") or {}
        if "deletionTimestamp" in job["metadata"]:
            self._let_go(job, status)
            return
        deployment = status.get("jobDeploymentStatus", "")
        if deployment in ("Initializing", "Running") and job["spec"].get("suspend"):
            self._say(name, jobDeploymentStatus="Suspending")
        elif deployment == "":
            self._begin(job)
        elif deployment == "Initializing":
            self._initialize(job, status)
        elif deployment == "Running":
            self._keep_running(job, status)
        elif deployment == "Suspending":
            self._suspend(name, status)
        elif deployment == "Suspended" and not job["spec"].get("suspend"):
            self._say(name, jobDeploymentStatus="")
        elif deployment in ("Complete", "Failed"):
            self._delete_cluster(status["rayClusterName"])

    def _begin(self, job: Json) -> None:
        name = job["metadata"]["name"]
        finalizers = [*job["metadata"].get("finalizers", []), FINALIZER]
        self._patch(name, {"metadata": {"finalizers": sorted(set(finalizers))}})
        cluster = f"{name}-{str(time.monotonic_ns())[-5:]}"
        self._say(name, jobDeploymentStatus="Initializing", rayClusterName=cluster, jobId=f"{cluster}-job")

    def _initialize(self, job: Json, status: Json) -> None:
        pods = self._cluster_pods(job, status, provisioned=False)
        unready = [pod.metadata.name for pod in pods if not _ready(pod)]
        if unready:
            condition = {"type": "HeadPodReady", "status": "False", "reason": "ContainersNotReady"}
            conditions = [condition | {"message": f"pods that are not ready: {', '.join(unready)}"}]
            self._say(job["metadata"]["name"], rayClusterStatus={"conditions": conditions})
        elif "dashboard" not in _service_ports(job):
            self.errors[job["metadata"]["name"]].add("dashboard port is not found")
        else:
            self._say(job["metadata"]["name"], jobDeploymentStatus="Running", rayClusterStatus={"conditions": []})

    def _keep_running(self, job: Json, status: Json) -> None:
        name = job["metadata"]["name"]
        pods = self._cluster_pods(job, status, provisioned=True)
        head = next((pod for pod in pods if _is_head(pod) and _ready(pod)), None)
        if head is None:  # Ray does not answer: KubeRay retries for 300 s
            return
        if self._submitted_to.get(name) != head.metadata.uid:
            self._submitted_to[name] = head.metadata.uid
            self.submissions[name] += 1
            self._say(name, jobStatus="RUNNING")
        elif name in self._ends:
            self._say(name, **self._ends.pop(name), endTime=_now())

    def _let_go(self, job: Json, status: Json) -> None:
        """Remove the finalizer; Ray first stops a job that may still run, with the token from the Secret."""
        cluster = self._cluster(status.get("rayClusterName", ""))
        if status.get("jobStatus") not in ("SUCCEEDED", "FAILED", "STOPPED") and cluster is not None:
            secret = job["spec"]["rayClusterSpec"]["authOptions"]["secretName"]
            try:
                self.core.read_namespaced_secret(secret, self.namespace)
            except ApiException:
                self.errors[job["metadata"]["name"]].add(f"failed to get auth secret {secret}")
                return
        kept = [item for item in job["metadata"].get("finalizers", []) if item != FINALIZER]
        self._patch(job["metadata"]["name"], {"metadata": {"finalizers": kept}})

    def _suspend(self, name: str, status: Json) -> None:
        """Delete the cluster without a request for a checkpoint."""
        self._delete_cluster(status["rayClusterName"])
        if not self._pods(status["rayClusterName"]):
            self._say(name, jobDeploymentStatus="Suspended", rayClusterName="", jobId="", jobStatus="", message="")

    # the cluster

    def _cluster_pods(self, job: Json, status: Json, *, provisioned: bool) -> list[client.V1Pod]:
        """Delete ended pods of a cluster, create missing ones, and return its pods."""
        name = status["rayClusterName"]
        cluster = self._cluster(name) or self._make_cluster(job, name)
        for pod in self._pods(name):
            if pod.status.phase in OVER:
                self.core.delete_namespaced_pod(pod.metadata.name, self.namespace)
        pods = [pod for pod in self._pods(name) if pod.metadata.deletion_timestamp is None]
        heads, spec = [pod for pod in pods if _is_head(pod)], job["spec"]["rayClusterSpec"]
        marks = job["metadata"].get("annotations") or {}
        if not heads and not (provisioned and marks.get(NO_NEW_HEAD) == "true"):
            self._make_pod(cluster, "head", spec["headGroupSpec"])
        for group in spec.get("workerGroupSpecs") or []:
            for _ in range(group["replicas"] - (len(pods) - len(heads))):
                self._make_pod(cluster, "worker", group)
        return [pod for pod in self._pods(name) if pod.metadata.deletion_timestamp is None]

    def _make_cluster(self, job: Json, name: str) -> Json:
        owner = _owner("RayJob", job)
        body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": name, "ownerReferences": [owner]}}
        made: Json = self.custom.create_namespaced_custom_object("ray.io", "v1", self.namespace, "rayclusters", body)
        return made

    def _make_pod(self, cluster: Json, kind: str, group: Json) -> None:
        template, name = group["template"], cluster["metadata"]["name"]
        spec = template["spec"]
        if kind == "worker":
            spec = spec | {"initContainers": [*spec.get("initContainers", []), _wait_for_gcs(spec["containers"][0])]}
        labels = {**template["metadata"].get("labels", {}), "ray.io/node-type": kind, "ray.io/cluster": name}
        metadata = {"generateName": f"{name}-{kind}-", "labels": labels}
        metadata |= {"ownerReferences": [_owner("RayCluster", cluster)]}
        self.core.create_namespaced_pod(self.namespace, {"metadata": metadata, "spec": spec})

    def _pods(self, cluster: str) -> list[client.V1Pod]:
        pods: list[client.V1Pod] = self.core.list_namespaced_pod(
            self.namespace, label_selector=f"ray.io/cluster={cluster}"
        ).items
        return pods

    def _cluster(self, name: str) -> Json | None:
        return next((item for item in self._list("rayclusters") if item["metadata"]["name"] == name), None)

    def _delete_cluster(self, name: str) -> None:
        with contextlib.suppress(ApiException):  # it is gone
            self.custom.delete_namespaced_custom_object("ray.io", "v1", self.namespace, "rayclusters", name)

    # the API server

    def _list(self, plural: str) -> list[Json]:
        found = self.custom.list_namespaced_custom_object("ray.io", "v1", self.namespace, plural)
        items: list[Json] = found["items"]
        return items

    def _say(self, name: str, **status: Any) -> None:
        arguments = ("ray.io", "v1", self.namespace, "rayjobs", name, {"status": status})
        self.custom.patch_namespaced_custom_object_status(*arguments)

    def _patch(self, name: str, body: Json) -> None:
        self.custom.patch_namespaced_custom_object("ray.io", "v1", self.namespace, "rayjobs", name, body)


def _service_ports(job: Json) -> list[str]:
    """Return the names of the head Service's ports: the first container's, or KubeRay's default ports."""
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    ports = [item["name"] for item in template["spec"]["containers"][0].get("ports", [])]
    return [*(ports or ["client", "gcs-server", "dashboard", "serve"]), "metrics"]


def _wait_for_gcs(trainer: Json) -> Json:
    """Return KubeRay's init container of a worker pod, which waits for the head with a fifth of a CPU."""
    check = "ray health-check --address head:6379"
    script = f"SECONDS=0; until {check} > /dev/null 2>&1; do echo $SECONDS seconds elapsed; sleep 5; done"
    share = {"cpu": "200m", "memory": "256Mi"}
    kept = {name: trainer[name] for name in ("image", "imagePullPolicy", "securityContext", "env", "volumeMounts")}
    command = ["/bin/bash", "-c", "--"]
    return kept | {
        "name": WAIT,
        "command": command,
        "args": [script],
        "resources": {"limits": share, "requests": share},
    }


def _owner(kind: str, body: Json) -> Json:
    identity = {name: body["metadata"][name] for name in ("name", "uid")}
    return {"apiVersion": "ray.io/v1", "kind": kind, **identity, "controller": True, "blockOwnerDeletion": True}


def _is_head(pod: client.V1Pod) -> bool:
    return bool(pod.metadata.labels["ray.io/node-type"] == "head")


def _ready(pod: client.V1Pod) -> bool:
    return any(item.type == "Ready" and item.status == "True" for item in pod.status.conditions or [])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
