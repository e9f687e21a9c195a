"""Each method of the stand-in leaves the pod in the state that a kubelet would leave on the API server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import until_gone
from support.cluster.kubelet_stand_in import KubeletStandIn

Pod = client.V1Pod


@pytest.fixture
def pod(core: client.CoreV1Api, namespace: str) -> Callable[[], Pod]:
    """Create a pod of two containers and an init container; return a function that reads it again."""
    containers = [client.V1Container(name=name, image="registry.example/i:1") for name in ("trainer", "sidecar")]
    first = client.V1Container(name="first", image="registry.example/i:1")
    spec = client.V1PodSpec(restart_policy="Never", containers=containers, init_containers=[first])
    made = core.create_namespaced_pod(namespace, Pod(metadata=client.V1ObjectMeta(name="p"), spec=spec))
    return lambda: core.read_namespaced_pod(made.metadata.name, namespace)


def conditions(pod: Pod) -> dict[str, tuple[str, str]]:
    return {each.type: (each.status, each.reason or "") for each in pod.status.conditions or []}


def states(pod: Pod) -> dict[str, Any]:
    return {each.name: each.state for each in pod.status.container_statuses}


def reasons(core: client.CoreV1Api, namespace: str) -> set[str]:
    return {event.reason for event in core.list_namespaced_event(namespace).items}


def test_running_at_an_address(kubelet: KubeletStandIn, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.running(namespace, "p", node="n1", ip="127.0.0.9")
    found = pod()
    assert (found.status.phase, found.status.pod_ip, found.spec.node_name) == ("Running", "127.0.0.9", "n1")
    assert all(state.running for state in states(found).values())
    assert conditions(found)["Ready"] == ("True", "")


@pytest.mark.parametrize(("exit_code", "phase"), [(0, "Succeeded"), (3, "Failed")])
def test_one_container_ends_so(
    kubelet: KubeletStandIn, namespace: str, pod: Callable[[], Pod], exit_code: int, phase: str
) -> None:
    kubelet.running(namespace, "p")
    kubelet.finished(namespace, "p", exit_code, message="said at the end", container="trainer")
    ended = states(pod())
    assert pod().status.phase == phase
    assert (ended["trainer"].terminated.exit_code, ended["sidecar"].terminated.exit_code) == (exit_code, 0)
    assert ended["trainer"].terminated.message == "said at the end"


def test_an_init_container_fails(kubelet: KubeletStandIn, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.scheduled(namespace, "p")
    kubelet.finished(namespace, "p", 2, container="first")
    (first,) = pod().status.init_container_statuses
    assert (first.state.terminated.exit_code, pod().status.phase) == (2, "Failed")
    assert states(pod())["trainer"].waiting.reason == "PodInitializing"


def test_out_of_memory(kubelet: KubeletStandIn, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.running(namespace, "p")
    kubelet.oom_killed(namespace, "p", container="trainer")
    ended = states(pod())["trainer"].terminated
    assert (ended.exit_code, ended.reason, pod().status.phase) == (137, "OOMKilled", "Failed")


def test_no_image(kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.image_pull_back_off(namespace, "p")
    waiting = states(pod())["trainer"].waiting
    assert (waiting.reason, pod().status.phase) == ("ImagePullBackOff", "Pending")
    assert "registry.example/i:1" in waiting.message
    assert "Failed" in reasons(core, namespace)


def test_no_node(kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.unschedulable(namespace, "p", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert conditions(pod())["PodScheduled"] == ("False", "Unschedulable")
    assert "FailedScheduling" in reasons(core, namespace)
    kubelet.running(namespace, "p")
    assert conditions(pod())["PodScheduled"] == ("True", "")


def test_evicted(kubelet: KubeletStandIn, namespace: str, pod: Callable[[], Pod]) -> None:
    kubelet.running(namespace, "p")
    kubelet.evicted(namespace, "p")
    assert (pod().status.phase, pod().status.reason) == ("Failed", "Evicted")
    assert conditions(pod())["DisruptionTarget"] == ("True", "TerminationByKubelet")


@pytest.mark.parametrize("move", ["preempted", "drained"])
def test_taken_off_its_node(
    kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str, pod: Callable[[], Pod], move: str
) -> None:
    kubelet.running(namespace, "p")
    getattr(kubelet, move)(namespace, "p")
    until_gone(core.list_namespaced_pod, "p", namespace=namespace)


def test_a_lost_node_takes_its_pods(
    kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str, pod: Callable[[], Pod]
) -> None:
    kubelet.running(namespace, "p", node="doomed")
    kubelet.node_lost("doomed")
    until_gone(core.list_namespaced_pod, "p", namespace=namespace)
    assert conditions(core.read_node("doomed"))["Ready"] == ("Unknown", "NodeStatusUnknown")


def test_a_deleted_pod_stays_until_its_kubelet_is_done(
    kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str, pod: Callable[[], Pod]
) -> None:
    kubelet.running(namespace, "p")
    kubelet.deleted(namespace, "p")
    assert pod().metadata.deletion_timestamp is not None
    kubelet.end_deletion(namespace, "p")
    until_gone(core.list_namespaced_pod, "p", namespace=namespace)
