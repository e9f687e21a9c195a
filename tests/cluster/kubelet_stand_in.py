"""Moves pods through their states, as a scheduler and a kubelet would: by bindings, status patches and deletions.

Reasons, messages and conditions are those that Kubernetes 1.34 writes (`pkg/kubelet/kubelet_pods.go`,
`pkg/kubelet/eviction`, `pkg/kubelet/images`, `pkg/scheduler`, `pkg/controller/tainteviction`).
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from access import until
from kubernetes import client

Json = dict[str, Any]
CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "1000", "ephemeral-storage": "1Ti"}
SIGTERM_EXIT = 143
SIGKILL_EXIT = 137


class KubeletStandIn:
    """Every method takes a pod by namespace and name and returns when the API server has the change."""

    def __init__(self, core: client.CoreV1Api) -> None:
        self.core = core

    def node(self, name: str = "node-a", *, gpus: int = 0, labels: dict[str, str] | None = None) -> str:
        """A Ready node, made where it is missing; returns its name."""
        known = {node.metadata.name for node in self.core.list_node().items}
        if name not in known:
            labels = {"kubernetes.io/hostname": name, **(labels or {})}
            self.core.create_node(client.V1Node(metadata=client.V1ObjectMeta(name=name, labels=labels)))
        capacity = CAPACITY | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        ready = _condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        self.core.patch_node_status(name, {"status": status})
        self.core.patch_node(name, {"spec": {"taints": None}})
        return name

    def pods(self, namespace: str, count: int, *, selector: str = "", timeout: float = 30) -> list[str]:
        """Names of the pods of that selector, in order, once there are `count` of them that nobody deletes."""
        query = {"namespace": namespace, "label_selector": selector}
        seen: dict[str, Any] = {}

        def enough(pod: client.V1Pod) -> bool:
            if pod.metadata.deletion_timestamp is None:
                seen[pod.metadata.name] = pod
            return len(seen) >= count

        until(self.core.list_namespaced_pod, enough, timeout=timeout, **query)
        return sorted(seen)

    def scheduled(self, namespace: str, name: str, node: str = "node-a") -> None:
        """Bind the pod to a node, which is made where it is missing."""
        target = client.V1ObjectReference(kind="Node", name=self.node(node))
        binding = client.V1Binding(metadata=client.V1ObjectMeta(name=name), target=target)
        # The answer is a Status, which the client cannot read as the Binding that its schema promises.
        self.core.create_namespaced_pod_binding(name, namespace, binding, _preload_content=False)

    def running(self, namespace: str, name: str, *, node: str = "node-a", ip: str = "127.0.0.1") -> None:
        """Bound (if it wasn't), init containers done, all containers started and ready, at `ip`."""
        pod = self._read(namespace, name)
        if not pod.spec.node_name:
            self.scheduled(namespace, name, node)
        started = {"running": {"startedAt": _now()}}
        self._patch_status(
            namespace,
            name,
            phase="Running",
            podIP=ip,
            podIPs=[{"ip": ip}],
            hostIP="127.0.0.1",
            startTime=_now(),
            conditions=_ready("True"),
            initContainerStatuses=[
                _container(init.name, init.image, {"terminated": _terminated(0, "Completed")}, ready=True)
                for init in pod.spec.init_containers or []
            ],
            containerStatuses=[
                _container(item.name, item.image, started, ready=True, started=True) for item in pod.spec.containers
            ],
        )

    def finished(
        self,
        namespace: str,
        name: str,
        exit_code: int = 0,
        *,
        reason: str = "",
        message: str = "",
        container: str = "",
    ) -> None:
        """The containers end with `exit_code`; `message` is the termination message.

        With `container`, that one alone ends so and the others (or init containers before it) end with 0.
        """
        pod = self._read(namespace, name)
        names = [item.name for item in [*(pod.spec.init_containers or []), *pod.spec.containers]]
        assert not container or container in names, f"{name} has no container {container}, only {names}"

        def ended(items: list[client.V1Container] | None) -> list[Json]:
            codes = [(item, exit_code if container in ("", item.name) else 0) for item in items or []]
            return [
                _container(item.name, item.image, {"terminated": _terminated(code, reason if code else "", message)})
                for item, code in codes
            ]

        self._patch_status(
            namespace,
            name,
            phase="Failed" if exit_code else "Succeeded",
            conditions=_ready("False", "PodFailed" if exit_code else "PodCompleted"),
            initContainerStatuses=ended(pod.spec.init_containers) if container else None,
            containerStatuses=ended(pod.spec.containers),
        )

    def oom_killed(self, namespace: str, name: str, *, container: str = "") -> None:
        """The kernel kills a container over its memory limit."""
        self.finished(namespace, name, SIGKILL_EXIT, reason="OOMKilled", container=container)

    def image_pull_back_off(self, namespace: str, name: str, *, node: str = "node-a") -> None:
        """The pod is on a node that cannot pull its image."""
        image = self._read(namespace, name).spec.containers[0].image
        message = f'Back-off pulling image "{image}": ErrImagePull: not found'
        self._waiting(namespace, name, node, "ImagePullBackOff", message)

    def config_error(self, namespace: str, name: str, message: str, *, node: str = "node-a") -> None:
        """The kubelet cannot make the container: a Secret or ConfigMap that it names is missing, say."""
        self._waiting(
            namespace, name, node, "CreateContainerConfigError", message.replace("{", "{{").replace("}", "}}")
        )

    def unschedulable(self, namespace: str, name: str, message: str) -> None:
        """The scheduler finds no node, such as `0/3 nodes are available: 3 Insufficient nvidia.com/gpu.`"""
        condition = _condition("PodScheduled", "False", "Unschedulable", message)
        self._patch_status(namespace, name, phase="Pending", conditions=[condition])
        self.event(namespace, name, "FailedScheduling", message, component="default-scheduler")

    def evicted(self, namespace: str, name: str, resource: str = "memory") -> None:
        """The kubelet evicts the pod from a node under pressure."""
        message = f"The node was low on resource: {resource}. "
        self._disrupted(namespace, name, "TerminationByKubelet", message)
        self._patch_status(namespace, name, phase="Failed", reason="Evicted", message=message)
        self.event(namespace, name, "Evicted", message)

    def preempted(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """The scheduler gives the pod's place to one of higher priority: marked, deleted, ended."""
        self._disrupted(namespace, name, "PreemptionByScheduler", "default-scheduler: preempting to accommodate a pod")
        self.deleted(namespace, name)
        self.end_deletion(namespace, name, exit_code)

    def drained(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """The eviction API takes the pod off its node, as `kubectl drain` asks."""
        self._disrupted(namespace, name, "EvictionByEvictionAPI", "Eviction API: evicting")
        self.deleted(namespace, name)
        self.end_deletion(namespace, name, exit_code)

    def node_lost(self, node: str) -> None:
        """The node stops answering: it is not ready, and its pods are marked, failed and removed by the control plane.

        `DeletionByTaintManager` is what the taint eviction controller writes, `NodeLost` what pods there show.
        """
        lost = _condition("Ready", "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
        self.core.patch_node_status(node, {"status": {"conditions": [lost]}})
        for pod in self.core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={node}").items:
            namespace, name = pod.metadata.namespace, pod.metadata.name
            if pod.status.phase in ("Succeeded", "Failed"):
                continue
            self._disrupted(namespace, name, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
            self.deleted(namespace, name)
            message = f"Node {node} which was running pod {name} is unresponsive"
            self._patch_status(
                namespace, name, phase="Failed", reason="NodeLost", message=message, conditions=_ready("False")
            )
            self._remove(namespace, name)

    def until_deleted(self, namespace: str, name: str, timeout: float = 30) -> None:
        """Come back once somebody has asked for the pod's deletion."""
        until(
            self.core.list_namespaced_pod,
            lambda pod: pod.metadata.deletion_timestamp is not None,
            timeout=timeout,
            namespace=namespace,
            field_selector=f"metadata.name={name}",
        )

    def until_quota(self, namespace: str, name: str) -> None:
        """Come back once the control plane counts for the quota."""
        until(
            self.core.list_namespaced_resource_quota,
            lambda quota: bool(quota.status.hard),
            namespace=namespace,
            field_selector=f"metadata.name={name}",
        )

    def deleted(self, namespace: str, name: str) -> None:
        """Ask for the pod's deletion with its grace period; on a node it stays until `end_deletion`."""
        self.core.delete_namespaced_pod(name, namespace)

    def end_deletion(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """What a kubelet does for a pod that is being deleted: its containers end, then the object goes.

        A pod of a Job stays until the Job controller has counted it and taken its finalizer away.
        """
        pod = self._find(namespace, name)
        if pod is not None and pod.status.phase not in ("Succeeded", "Failed"):
            self.finished(namespace, name, exit_code, reason="Error" if exit_code else "")
        if pod is not None:
            self._remove(namespace, name)

    def event(
        self, namespace: str, name: str, reason: str, message: str, *, kind: str = "Warning", component: str = "kubelet"
    ) -> None:
        """A core event about the pod."""
        pod = self._read(namespace, name)
        about = client.V1ObjectReference(
            api_version="v1", kind="Pod", namespace=namespace, name=name, uid=pod.metadata.uid
        )
        moment = datetime.now(UTC)
        self.core.create_namespaced_event(
            namespace,
            client.CoreV1Event(
                metadata=client.V1ObjectMeta(name=f"{name}.{uuid.uuid4().hex[:16]}"),
                involved_object=about,
                reason=reason,
                message=message,
                type=kind,
                source=client.V1EventSource(component=component),
                first_timestamp=moment,
                last_timestamp=moment,
                count=1,
            ),
        )

    def _waiting(self, namespace: str, name: str, node: str, reason: str, message: str) -> None:
        pod = self._read(namespace, name)
        if not pod.spec.node_name:
            self.scheduled(namespace, name, node)
        state = {"waiting": {"reason": reason, "message": message}}
        statuses = [_container(item.name, item.image, state) for item in pod.spec.containers]
        self._patch_status(
            namespace,
            name,
            phase="Pending",
            startTime=_now(),
            conditions=_ready("False", "ContainersNotReady"),
            containerStatuses=statuses,
        )
        self.event(namespace, name, "Failed", message)

    def _disrupted(self, namespace: str, name: str, reason: str, message: str) -> None:
        condition = _condition("DisruptionTarget", "True", reason, message)
        self._patch_status(namespace, name, conditions=[condition])

    def _patch_status(self, namespace: str, name: str, **status: Any) -> None:
        """Strategic merge: conditions are merged by type, container statuses replaced."""
        body = {key: value for key, value in status.items() if value is not None}
        self.core.patch_namespaced_pod_status(name, namespace, {"status": body})

    def _read(self, namespace: str, name: str) -> client.V1Pod:
        return self.core.read_namespaced_pod(name, namespace)

    def _find(self, namespace: str, name: str) -> client.V1Pod | None:
        found = self.core.list_namespaced_pod(namespace, field_selector=f"metadata.name={name}").items
        return found[0] if found else None

    def _remove(self, namespace: str, name: str) -> None:
        if self._find(namespace, name) is not None:
            self.core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": _now()}


def _ready(status: str, reason: str = "") -> list[Json]:
    """The conditions of a pod on a node whose containers are ready, or aren't."""
    made = [_condition(kind, "True") for kind in ("PodScheduled", "Initialized")]
    return [*made, *(_condition(kind, status, reason) for kind in ("ContainersReady", "Ready"))]


def _terminated(exit_code: int, reason: str = "", message: str = "") -> Json:
    reason = reason or ("Error" if exit_code else "Completed")
    times = {"startedAt": _now(), "finishedAt": _now()}
    return {"exitCode": exit_code, "reason": reason, "message": message, "containerID": "containerd://0", **times}


def _container(name: str, image: str, state: Json, *, ready: bool = False, started: bool = False) -> Json:
    identity = {"name": name, "image": image, "imageID": image, "restartCount": 0}
    return {**identity, "state": state, "ready": ready, "started": started}
