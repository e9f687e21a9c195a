"""The test control plane creates pods of Jobs, deletes owned objects, and enforces RBAC."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, until, until_gone
from support.cluster.control_plane import ControlPlane
from support.cluster.kubelet_stand_in import KubeletStandIn

IMAGE = "registry.example/trainer:1"


def indexed_job(name: str, pods: int = 2, **spec: Any) -> dict[str, Any]:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": IMAGE}]}}
    fields = {"completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimit": 0}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {**fields, "template": template, **spec},
    }


@pytest.fixture
def batch(api: client.ApiClient) -> client.BatchV1Api:
    return client.BatchV1Api(api)


def has_condition(kind: str) -> Any:
    return lambda job: any(each.type == kind and each.status == "True" for each in job.status.conditions or [])


def test_pod_zero_s_success_ends_the_job_and_its_other_pod(
    admin: Access, batch: client.BatchV1Api, core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str
) -> None:
    admin.apply(indexed_job("two", successPolicy={"rules": [{"succeededIndexes": "0"}]}), namespace=namespace)
    first, second = kubelet.pods(namespace, 2, selector="job-name=two")
    kubelet.running(namespace, first, ip="127.0.0.2")
    kubelet.running(namespace, second, ip="127.0.0.3")
    assert core.read_namespaced_pod(first, namespace).status.pod_ip == "127.0.0.2"
    kubelet.finished(namespace, first)
    until(core.list_namespaced_pod, lambda pod: pod.metadata.deletion_timestamp, namespace=namespace)
    kubelet.end_deletion(namespace, second)
    until(batch.list_namespaced_job, has_condition("Complete"), namespace=namespace)
    until_gone(core.list_namespaced_pod, second, namespace=namespace)


def test_a_deleted_job_takes_its_pods_along(
    admin: Access, batch: client.BatchV1Api, core: client.CoreV1Api, kubelet: KubeletStandIn, namespace: str
) -> None:
    admin.apply(indexed_job("gone", 1), namespace=namespace)
    (pod,) = kubelet.pods(namespace, 1)
    batch.delete_namespaced_job("gone", namespace, propagation_policy="Background")
    until_gone(core.list_namespaced_pod, pod, namespace=namespace)


def test_a_finished_job_goes_after_its_ttl(
    admin: Access, batch: client.BatchV1Api, kubelet: KubeletStandIn, namespace: str
) -> None:
    admin.apply(indexed_job("short", 1, ttlSecondsAfterFinished=0), namespace=namespace)
    (pod,) = kubelet.pods(namespace, 1)
    kubelet.finished(namespace, pod)
    until_gone(batch.list_namespaced_job, "short", namespace=namespace)


def test_a_service_account_has_no_rights_but_those_it_was_given(
    admin: Access, core: client.CoreV1Api, namespace: str
) -> None:
    nobody = admin.service_account(namespace, "default")
    with nobody.client() as api, pytest.raises(client.ApiException) as refused:
        client.CoreV1Api(api).list_namespaced_pod(namespace)
    assert refused.value.status == 403
    admin.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", f"--namespace={namespace}")
    binding = ["--role=reader", f"--serviceaccount={namespace}:default", f"--namespace={namespace}"]
    admin.kubectl("create", "rolebinding", "reader", *binding)
    assert nobody.kubectl("get", "pods", f"--namespace={namespace}").returncode == 0


@pytest.mark.parametrize("kill", [False, True])
def test_data_outlive_a_restart_of_the_api_server(
    control_plane: ControlPlane, core: client.CoreV1Api, namespace: str, kill: bool
) -> None:
    before = core.read_namespace(namespace).metadata.uid
    pid = control_plane.apiserver_pid()
    control_plane.restart_apiserver(kill=kill)
    assert control_plane.apiserver_pid() != pid
    assert core.read_namespace(namespace).metadata.uid == before
