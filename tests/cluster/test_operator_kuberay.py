"""The engine `kuberay` on a real API server. RayJobs are moved through their states as KubeRay would move them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from access import Access, namespace_of, until, until_gone
from finetune_jobs import Jobs, condition, job
from helm_chart import Installed
from kubernetes import client
from operator_process import FAST, OperatorProcess
from ray_job_crd import NAME, ray_job_crd

from finetune_operator.actions import StartRun
from finetune_operator.plan import Create, plan
from finetune_operator.settings import Settings

Status = Callable[..., None]
KUBERAY = {"preflight": False, "engine": "kuberay"}
SIDE = {"name": "side", "image": "x"}


@pytest.fixture(scope="module")
def kuberay(
    admin: Access,
    api: client.ApiClient,
    finetune_jobs: client.CustomObjectsApi,
    release: Installed,
    operator_access: Access,
    operator: OperatorProcess,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatorProcess]:
    """An operator that found no KubeRay when it started, and started again when it came."""
    directory = tmp_path_factory.mktemp("kuberay")
    operator.kill()  # no two operators may watch one namespace
    extensions = client.ApiextensionsV1Api(api)
    with OperatorProcess(operator_access, directory, **(release.environment | FAST)) as running:
        admin.kubectl("create", "namespace", "waits-for-kuberay")
        waiting = Jobs(finetune_jobs, "waits-for-kuberay")
        waiting.create(job("early", kubernetes=KUBERAY))
        waiting.until(lambda status: "EngineMissing" in str(status.get("conditions")), "early")
        admin.apply(ray_job_crd())
        until(extensions.list_custom_resource_definition, _established, field_selector=f"metadata.name={NAME}")
        waiting.patch("early", {"runPolicy": {"backoffLimit": 2}})  # a reason to look again before the minute is over
        assert running.wait_for_death(30), "it did not start again"
        running.start()
        waiting.until(lambda status: status.get("attempt") == 1, "early")
        yield running
    admin.kubectl("delete", "namespace", "waits-for-kuberay", "--wait=false")
    extensions.delete_custom_resource_definition(NAME)
    until_gone(extensions.list_custom_resource_definition, NAME)
    operator.start()


def _established(definition: client.V1CustomResourceDefinition) -> bool:
    conditions = (definition.status and definition.status.conditions) or []
    return any(condition.type == "Established" and condition.status == "True" for condition in conditions)


@pytest.fixture
def ray_jobs(kuberay: OperatorProcess, finetune_jobs: client.CustomObjectsApi, namespace: str) -> Jobs:
    return Jobs(finetune_jobs, namespace)


@pytest.fixture
def say(finetune_jobs: client.CustomObjectsApi, namespace: str) -> Status:
    """Write a RayJob's status, once the RayJob is there."""
    place = {"group": "ray.io", "version": "v1", "namespace": namespace, "plural": "rayjobs"}

    def write(name: str, **status: Any) -> None:
        until(finetune_jobs.list_namespaced_custom_object, lambda item: item["metadata"]["name"] == name, **place)
        finetune_jobs.patch_namespaced_custom_object_status(*place.values(), name, {"status": status})

    return write


def test_a_ray_job_s_life(ray_jobs: Jobs, say: Status) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"nodes": 2, "gpusPerNode": 1}))
    say("tiny-1", jobDeploymentStatus="Initializing")
    assert condition(ray_jobs.until(lambda status: status.get("attempt") == 1), "Running")["reason"] == "Starting"
    say("tiny-1", jobDeploymentStatus="Running", jobStatus="RUNNING")
    ray_jobs.until_phase("Running")
    say("tiny-1", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    ray_jobs.until_phase("Succeeded")


def test_a_user_error_by_the_entrypoint_s_exit_code(ray_jobs: Jobs, say: Status) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY))
    message = "Job entrypoint command failed with exit code 2, last available logs: stages[0].data: no such file"
    say("tiny-1", jobDeploymentStatus="Failed", jobStatus="FAILED", message=message)
    failed = ray_jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == "UserError"


def test_a_lost_cluster_is_tried_again(ray_jobs: Jobs, say: Status) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY))
    say("tiny-1", jobDeploymentStatus="Failed", jobStatus="FAILED", message="failed to connect to GCS")
    say("tiny-2", jobDeploymentStatus="Running", jobStatus="RUNNING")
    seen = ray_jobs.until(lambda status: status.get("attempt") == 2)
    assert seen["status"]["attempts"][0]["reason"] == "RendezvousFailed"


def test_a_queue_holds_a_ray_job(ray_jobs: Jobs, say: Status, finetune_jobs: client.CustomObjectsApi) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY))
    say("tiny-1", jobDeploymentStatus="Suspended")
    held = ray_jobs.until_phase("Queued")
    assert condition(held, "Admitted")["status"] == "False"


FULL = {
    "nodes": 3,
    "gpusPerNode": 8,
    "cpusPerNode": "64",
    "memoryPerNode": "512Gi",
    "podTemplate": {
        "spec": {
            "containers": [{"name": "trainer", "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}],
            "nodeSelector": {"gpu": "h100"},
        }
    },
}


def test_kuberay_s_own_fields_and_no_others(
    kuberay: OperatorProcess, finetune_jobs: client.CustomObjectsApi, core: client.CoreV1Api, admin: Access
) -> None:
    """A RayJob is taken where unknown fields are errors; its pods are, where Pod Security is at its strictest."""
    body = job("a" * 40, kubernetes={"engine": "kuberay"}, resources=FULL)
    body["metadata"] |= {"uid": "0123abcd-0000-0000-0000-000000000000"}
    settings = Settings(token_key=b"k", ray_version="2.60.0", image="trainer:1")
    with namespace_of(admin, "strict", {"pod-security.kubernetes.io/enforce": "restricted"}) as namespace:
        body["metadata"]["namespace"] = namespace
        made = plan(body, (StartRun(999999),), settings)[-1]
        assert isinstance(made, Create) and len(made.body["metadata"]["name"]) == 47
        strict = {"field_validation": "Strict", "dry_run": "All"}
        finetune_jobs.create_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", made.body, **strict)
        cluster = made.body["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            core.create_namespaced_pod(namespace, pod, **strict)


def test_the_first_container_is_ray_s(ray_jobs: Jobs, say: Status, finetune_jobs: client.CustomObjectsApi) -> None:
    """KubeRay takes it for that, whatever its name is."""
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"podTemplate": {"spec": {"containers": [SIDE]}}}))
    say("tiny-1", jobDeploymentStatus="Initializing")
    made = finetune_jobs.get_namespaced_custom_object("ray.io", "v1", ray_jobs.namespace, "rayjobs", "tiny-1")
    containers = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert [item["name"] for item in containers] == ["trainer", "side"]


def test_suspension_deletes_the_ray_job_once_its_driver_was_asked(ray_jobs: Jobs, say: Status) -> None:
    ray_jobs.create(job(kubernetes={**KUBERAY, "checkpointGraceSeconds": 1}))
    say("tiny-1", jobDeploymentStatus="Running", jobStatus="RUNNING")
    ray_jobs.until_phase("Running")
    ray_jobs.patch("tiny", {"runPolicy": {"suspend": True}})
    suspended = ray_jobs.until_phase("Suspended")
    assert suspended["status"]["attempts"][0]["reason"] == "Suspended"
    place = {"group": "ray.io", "version": "v1", "namespace": ray_jobs.namespace, "plural": "rayjobs"}
    until_gone(ray_jobs.api.list_namespaced_custom_object, "tiny-1", **place)
