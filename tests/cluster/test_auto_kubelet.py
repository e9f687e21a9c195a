"""The automatic kubelet moves many pods at once."""

from __future__ import annotations

from typing import Any

from kubernetes import client
from support.cluster.access import Access, until, until_gone
from support.cluster.auto_kubelet import AutoKubelet
from support.cluster.kubelet_stand_in import KubeletStandIn

PODS = 100


def indexed_job(name: str) -> dict[str, Any]:
    containers = [{"name": "trainer", "image": "registry.example/trainer:1"}]
    template = {"metadata": {"labels": {"fleet": name}}, "spec": {"restartPolicy": "Never", "containers": containers}}
    spec = {"completionMode": "Indexed", "completions": PODS, "parallelism": PODS, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def complete(job: client.V1Job) -> bool:
    return any(each.type == "Complete" and each.status == "True" for each in job.status.conditions or [])


def test_pods_run_and_end(
    admin: Access, api: client.ApiClient, core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str
) -> None:
    admin.apply(indexed_job("ends"), namespace=namespace)
    with AutoKubelet(admin, kubelet.node("fleet"), selector="fleet=ends", ends=lambda pod: 0) as fleet:
        fleet.wait_running(PODS)
        until(client.BatchV1Api(api).list_namespaced_job, complete, namespace=namespace)
    pods = core.list_namespaced_pod(namespace).items
    assert {(pod.status.phase, pod.spec.node_name) for pod in pods} == {("Succeeded", "fleet")}


def test_deleted_pods_go(
    admin: Access, api: client.ApiClient, core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str
) -> None:
    admin.apply(indexed_job("goes"), namespace=namespace)
    with AutoKubelet(admin, kubelet.node("fleet"), selector="fleet=goes") as fleet:
        fleet.wait_running(PODS)
        batch = client.BatchV1Api(api)
        batch.delete_namespaced_job("goes", namespace, propagation_policy="Foreground")
        until_gone(batch.list_namespaced_job, "goes", namespace=namespace)
    assert core.list_namespaced_pod(namespace).items == []
