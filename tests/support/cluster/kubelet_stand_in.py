"""A stand-in of scheduler and kubelet that changes pods by bindings, status patches and deletions.

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
    """A stand-in whose methods take a pod by namespace and name and return after the change."""

    def __init__(self, core: client.CoreV1Api) -> None:
        self.core = core

    def node(self, name: str = "node-a", *, gpus: int = 0, labels: dict[str, str] | None = None) -> str:
        """Create a Ready node if it is missing, and return its name."""
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
        except client.ApiException as error:  # several jobs may create it at the same time
            if error.status != 409:
                raise

    def pods(self, namespace: str, count: int, *, selector: str = "", timeout: float = 30) -> list[str]:
        """Wait for `count` pods of that selector that are not being deleted, and return their names in order."""
        query = {"namespace": namespace, "label_selector": selector}
        seen: dict[str, Any] = {}

        def enough(pod: client.V1Pod) -> bool:
            if pod.metadata.deletion_timestamp is None:
                seen[pod.metadata.name] = pod
            return len(seen) >= count

        until(self.core.list_namespaced_pod, enough, timeout=timeout, **query)
        return sorted(seen)

    def scheduled(self, namespace: str, name: str, node: str = "node-a") -> None:
        """Bind the pod to a node, which is created if it is missing."""
        target = client.V1ObjectReference(kind="Node", name=self.node(node))
        binding = client.V1Binding(metadata=client.V1ObjectMeta(name=name), target=target)
        # The answer is a Status, which the client cannot parse as the Binding of its schema.
        self.core.create_namespaced_pod_binding(name, namespace, binding, _preload_content=False)

    def running(self, namespace: str, name: str, *, node: str = "node-a", ip: str = "127.0.0.1") -> None:
        """Bind the pod if necessary, complete its init containers, and make all containers ready at `ip`."""
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
        """End the containers with `exit_code`; `message` is the termination message.

        With `container`, only that one ends so; the others end with 0, or never start if it is an init container.
        """
        pod = self._read(namespace, name)
        names = [item["name"] for item in [*pod_status.inits(pod), *pod_status.containers(pod)]]
        assert not container or container in names, f"{name} has no container {container}, only {names}"
        ended = pod_status.finished(pod, exit_code, reason=reason, message=message, container=container)
        self._patch_status(namespace, name, **ended)

    def oom_killed(self, namespace: str, name: str, *, container: str = "") -> None:
        """Kill a container that exceeds its memory limit, as the kernel does."""
        self.finished(namespace, name, SIGKILL_EXIT, reason="OOMKilled", container=container)

    def image_pull_back_off(self, namespace: str, name: str, *, node: str = "node-a") -> None:
        """Put the pod on a node that cannot pull its image."""
        image = pod_status.containers(self._read(namespace, name))[0]["image"]
        message = f'Back-off pulling image "{image}": ErrImagePull: not found'
        self._waiting(namespace, name, node, "ImagePullBackOff", message)

    def config_error(self, namespace: str, name: str, message: str, *, node: str = "node-a") -> None:
        """Report that the kubelet cannot create the container, for example because a Secret is missing."""
        self._waiting(namespace, name, node, "CreateContainerConfigError", message)

    def unschedulable(self, namespace: str, name: str, message: str) -> None:
        """Report that no node fits, such as `0/3 nodes are available: 3 Insufficient nvidia.com/gpu.`."""
        made = condition("PodScheduled", "False", "Unschedulable", message)
        self._patch_status(namespace, name, phase="Pending", conditions=[made])
        self.event(namespace, name, "FailedScheduling", message, component="default-scheduler")

    def evicted(self, namespace: str, name: str, resource: str = "memory") -> None:
        """Evict the pod from a node under pressure, as the kubelet does."""
        message = f"The node was low on resource: {resource}. "
        self._disrupted(namespace, name, "TerminationByKubelet", message)
        self._patch_status(namespace, name, phase="Failed", reason="Evicted", message=message)
        self.event(namespace, name, "Evicted", message)

    def preempted(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """Preempt the pod for one of higher priority: mark, delete and end it."""
        self._disrupted(namespace, name, "PreemptionByScheduler", "default-scheduler: preempting to accommodate a pod")
        self.deleted(namespace, name)
        self.end_deletion(namespace, name, exit_code)

    def drained(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """Evict the pod by the eviction API, as `kubectl drain` does."""
        self._disrupted(namespace, name, "EvictionByEvictionAPI", "Eviction API: evicting")
        self.deleted(namespace, name)
        self.end_deletion(namespace, name, exit_code)

    def node_lost(self, node: str) -> None:
        """Make the node unready, and mark, fail and remove its pods, as the control plane does.

        The taint eviction controller writes `DeletionByTaintManager`, and pods on such a node show `NodeLost`.
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
        """Wait until the deletion of the pod was requested."""
        until(
            self.core.list_namespaced_pod,
            lambda pod: pod.metadata.deletion_timestamp is not None,
            timeout=timeout,
            namespace=namespace,
            field_selector=f"metadata.name={name}",
        )

    def until_quota(self, namespace: str, name: str) -> None:
        """Wait until the control plane counts usage for the quota."""
        until(
            self.core.list_namespaced_resource_quota,
            lambda quota: bool(quota.status.hard),
            namespace=namespace,
            field_selector=f"metadata.name={name}",
        )

    def deleted(self, namespace: str, name: str) -> None:
        """Delete the pod with its grace period; on a node it remains until `end_deletion`."""
        self.core.delete_namespaced_pod(name, namespace)

    def deleted_by_force(self, namespace: str, name: str) -> None:
        """Delete the pod as `kubectl delete pod --force --grace-period=0` does."""
        self._remove(namespace, name)
        self.finished(namespace, name, SIGKILL_EXIT, reason="Error")

    def end_deletion(self, namespace: str, name: str, exit_code: int = SIGTERM_EXIT) -> None:
        """End the containers of a pod that is being deleted, and remove the object, as a kubelet does.

        A pod of a Job remains until the Job controller has counted it and removed its finalizer.
        """
        pod = self._find(namespace, name)
        if pod is not None and pod.status.phase not in ("Succeeded", "Failed"):
            self.finished(namespace, name, exit_code, reason="Error" if exit_code else "")
        if pod is not None:
            self._remove(namespace, name)

    def event(
        self, namespace: str, name: str, reason: str, message: str, *, kind: str = "Warning", component: str = "kubelet"
    ) -> None:
        """Create a core event of the pod."""
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
        """Return the pod, bound to `node` if it was not bound."""
        pod = self._read(namespace, name)
        if not pod["spec"].get("nodeName"):
            self.scheduled(namespace, name, node)
        return pod

    def _disrupted(self, namespace: str, name: str, reason: str, message: str) -> None:
        made = condition("DisruptionTarget", "True", reason, message)
        self._patch_status(namespace, name, conditions=[made])

    def _patch_status(self, namespace: str, name: str, **status: Any) -> None:
        """Patch the status: conditions are merged by type, container statuses are replaced."""
        self.core.patch_namespaced_pod_status(name, namespace, {"status": status})

    def _read(self, namespace: str, name: str) -> Json:
        found: Json = self.core.api_client.sanitize_for_serialization(self.core.read_namespaced_pod(name, namespace))
        return found

    def _find(self, namespace: str, name: str) -> client.V1Pod | None:
        found = self.core.list_namespaced_pod(namespace, field_selector=f"metadata.name={name}").items
        return found[0] if found else None

    def _remove(self, namespace: str, name: str) -> None:
        # The garbage collector may already have deleted a pod that has ended.
        with contextlib.suppress(NotFoundException):
            self.core.delete_namespaced_pod(name, namespace, grace_period_seconds=0)
