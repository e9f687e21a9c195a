"""Moves pods through their states, as a scheduler and a kubelet would: by bindings, status patches and deletions.

Reasons, messages and conditions are those that Kubernetes 1.34 writes (`pkg/kubelet/kubelet_pods.go`,
`pkg/kubelet/eviction`, `pkg/kubelet/images`, `pkg/scheduler`, `pkg/controller/tainteviction`).
"""

from __future__ import annotations

import contextlib
import uuid
from datetime import UTC, datetime
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import NotFoundException
from support.cluster import pod_status
from support.cluster.access import until
from support.cluster.pod_status import condition, readiness

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
            self._make_node(client.V1Node(metadata=client.V1ObjectMeta(name=name, labels=labels)))
        capacity = CAPACITY | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        ready = condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
        self.core.patch_node_status(name, {"status": status})
        self.core.patch_node(name, {"spec": {"taints": None}})
        return name

    def _make_node(self, node: client.V1Node) -> None:
        try:
            self.core.create_node(node)
        except client.ApiException as error:  # lives that go on at the same time may all miss it at first
            if error.status != 409:
                raise

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
        pod = self._on_node(namespace, name, node)
        self._patch_status(namespace, name, **pod_status.running(pod, ip))

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

        With `container`, that one alone ends so; the others end with 0, or never start where it is an init container.
        """
        pod = self._read(namespace, name)
        names = [item["name"] for item in [*pod_status.inits(pod), *pod_status.containers(pod)]]
        assert not container or container in names, f"{name} has no container {container}, only {names}"
        ended = pod_status.finished(pod, exit_code, reason=reason, message=message, container=container)
        self._patch_status(namespace, name, **ended)

    def oom_killed(self, namespace: str, name: str, *, container: str = "") -> None:
        """The kernel kills a container over its memory limit."""
        self.finished(namespace, name, SIGKILL_EXIT, reason="OOMKilled", container=container)

    def image_pull_back_off(self, namespace: str, name: str, *, node: str = "node-a") -> None:
        """The pod is on a node that cannot pull its image."""
        image = pod_status.containers(self._read(namespace, name))[0]["image"]
        message = f'Back-off pulling image "{image}": ErrImagePull: not found'
        self._waiting(namespace, name, node, "ImagePullBackOff", message)

    def config_error(self, namespace: str, name: str, message: str, *, node: str = "node-a") -> None:
        """The kubelet cannot make the container: a Secret or ConfigMap that it names is missing, say."""
        self._waiting(namespace, name, node, "CreateContainerConfigError", message)

    def unschedulable(self, namespace: str, name: str, message: str) -> None:
        """The scheduler finds no node, such as `0/3 nodes are available: 3 Insufficient nvidia.com/gpu.`."""
        made = condition("PodScheduled", "False", "Unschedulable", message)
        self._patch_status(namespace, name, phase="Pending", conditions=[made])
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
        lost = condition("Ready", "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
        self.core.patch_node_status(node, {"status": {"conditions": [lost]}})
        for pod in self.core.list_pod_for_all_namespaces(field_selector=f"spec.nodeName={node}").items:
            namespace, name = pod.metadata.namespace, pod.metadata.name
            if pod.status.phase in ("Succeeded", "Failed"):
                continue
            self._disrupted(namespace, name, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
            self.deleted(namespace, name)
            message = f"Node {node} which was running pod {name} is unresponsive"
            self._patch_status(
                namespace, name, phase="Failed", reason="NodeLost", message=message, conditions=readiness("False")
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

    def deleted_by_force(self, namespace: str, name: str) -> None:
        """`kubectl delete pod --force --grace-period=0`: its containers are killed after that, and the object goes."""
        self._remove(namespace, name)
        self.finished(namespace, name, SIGKILL_EXIT, reason="Error")

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
            api_version="v1", kind="Pod", namespace=namespace, name=name, uid=pod["metadata"]["uid"]
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
        pod = self._on_node(namespace, name, node)
        self._patch_status(namespace, name, **pod_status.waiting(pod, reason, message))
        self.event(namespace, name, "Failed", message)

    def _on_node(self, namespace: str, name: str, node: str) -> Json:
        """The pod, bound to `node` if it was to none."""
        pod = self._read(namespace, name)
        if not pod["spec"].get("nodeName"):
            self.scheduled(namespace, name, node)
        return pod

    def _disrupted(self, namespace: str, name: str, reason: str, message: str) -> None:
        made = condition("DisruptionTarget", "True", reason, message)
        self._patch_status(namespace, name, conditions=[made])

    def _patch_status(self, namespace: str, name: str, **status: Any) -> None:
        """Strategic merge: conditions are merged by type, container statuses replaced."""
        self.core.patch_namespaced_pod_status(name, namespace, {"status": status})

    def _read(self, namespace: str, name: str) -> Json:
        found: Json = self.core.api_client.sanitize_for_serialization(self.core.read_namespaced_pod(name, namespace))
        return found

    def _find(self, namespace: str, name: str) -> client.V1Pod | None:
        found = self.core.list_namespaced_pod(namespace, field_selector=f"metadata.name={name}").items
        return found[0] if found else None

    def _remove(self, namespace: str, name: str) -> None:
        # The garbage collector deletes a pod that has ended at once, and may be first.
        with contextlib.suppress(NotFoundException):
            self.core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)
