"""The engine `kuberay` runs jobs on a real API server with a stand-in for KubeRay's operator."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, namespace_of, until_gone
from support.cluster.finetune_jobs import Jobs, condition, driver, job
from support.cluster.helm_chart import Installed
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.kuberay_stand_in import WAIT, KubeRayStandIn
from support.cluster.operator_process import FAST, OperatorProcess, eventually
from support.cluster.ray_job_crd import CLUSTER_NAME, NAME, ray_cluster_crd, ray_job_crd

from finetune_operator.core.settings import Settings
from finetune_operator.decide.actions import StartRun
from finetune_operator.plan import Create, plan

Json = dict[str, Any]
KUBERAY = {"preflight": False, "engine": "kuberay"}
QUICK = {"FINETUNE_ENGINE_SECONDS": "3"}
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
    """Run an operator that starts without KubeRay's CRDs, and restart it after they are installed."""
    directory = tmp_path_factory.mktemp("kuberay")
    operator.kill()  # only one operator may watch a namespace
    extensions = client.ApiextensionsV1Api(api)
    with OperatorProcess(operator_access, directory, **(release.environment | FAST | QUICK)) as running:
        admin.kubectl("create", "namespace", "waits-for-kuberay")
        waiting = Jobs(finetune_jobs, "waits-for-kuberay")
        waiting.create(job("early", kubernetes=KUBERAY))
        waiting.until(lambda status: "EngineMissing" in str(status.get("conditions")), "early")
        admin.define(ray_job_crd(), ray_cluster_crd())
        waiting.patch("early", {"runPolicy": {"backoffLimit": 2}})  # triggers a reconciliation before the next minute
        assert running.wait_for_death(30), "it did not start again"
        running.start()
        waiting.until(lambda status: status.get("attempt") == 1, "early")
        yield running
    admin.kubectl("delete", "namespace", "waits-for-kuberay", "--wait=false")
    for name in (NAME, CLUSTER_NAME):
        extensions.delete_custom_resource_definition(name)
        until_gone(extensions.list_custom_resource_definition, name)
    operator.start()


@pytest.fixture
def ray_jobs(kuberay: OperatorProcess, finetune_jobs: client.CustomObjectsApi, namespace: str) -> Jobs:
    return Jobs(finetune_jobs, namespace)


@pytest.fixture
def ray(api: client.ApiClient, ray_jobs: Jobs) -> Iterator[KubeRayStandIn]:
    with KubeRayStandIn(api, ray_jobs.namespace) as stand_in:
        yield stand_in


class Pods:
    """The pods of an attempt, with the kubelet that changes their states."""

    def __init__(self, kubelet: KubeletStandIn, namespace: str) -> None:
        self.kubelet, self.namespace = kubelet, namespace

    def head(self, attempt: int = 1) -> str:
        """Return the name of the attempt's head pod once it exists."""
        selector = f"finetune.dev/run={attempt},ray.io/node-type=head"
        return self.kubelet.pods(self.namespace, 1, selector=selector)[0]

    def run(self, attempt: int = 1, count: int = 1, ip: str = "127.0.0.1") -> str:
        """Start all pods of the attempt and return the name of the head."""
        for name in self.kubelet.pods(self.namespace, count, selector=f"finetune.dev/run={attempt}"):
            self.kubelet.running(self.namespace, name, ip=ip)
        return self.head(attempt)

    def end(self, name: str, code: int = 0, **how: str) -> None:
        self.kubelet.finished(self.namespace, name, code, **how)

    def end_all(self, attempt: int) -> None:
        """End all pods that are being deleted, as a kubelet does."""
        for pod in self.kubelet.core.list_namespaced_pod(self.namespace).items:
            if pod.metadata.labels.get("finetune.dev/run") == str(attempt) and pod.metadata.deletion_timestamp:
                self.kubelet.end_deletion(self.namespace, pod.metadata.name)


@pytest.fixture
def pods(kubelet: KubeletStandIn, namespace: str) -> Pods:
    return Pods(kubelet, namespace)


def ray_objects(jobs: Jobs, plural: str = "rayjobs") -> dict[str, Json]:
    """Return KubeRay's objects in the test's namespace by name."""
    found = jobs.api.list_namespaced_custom_object("ray.io", "v1", jobs.namespace, plural)["items"]
    return {item["metadata"]["name"]: item for item in found}


def test_a_ray_job_s_life(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"nodes": 2, "gpusPerNode": 1}))
    pods.head()
    waiting = ray_jobs.until(lambda status: "ContainersNotReady" in str(status.get("conditions")))
    assert "KubeRay: Initializing; HeadPodReady: ContainersNotReady" in condition(waiting, "Running")["message"]
    head = pods.run(count=2)
    ray_jobs.until_phase("Running")
    eventually(lambda: ray.submissions == {"tiny-1": 1})
    ray.finish("tiny-1")
    pods.end(head, message='{"exitCode": 0, "stages": []}')
    ray_jobs.until_phase("Succeeded")


def test_no_worker_waits_in_kuberay_s_init_container(
    ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods, tmp_path: Path
) -> None:
    """KubeRay's `ray health-check` takes 15 to 30 s with a fifth of a CPU, and is retried every 5 s."""
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"nodes": 2}))
    core, place = pods.kubelet.core, ray_jobs.namespace
    (name,) = pods.kubelet.pods(place, 1, selector="ray.io/node-type=worker")
    spec = core.read_namespaced_pod(name, place).spec
    (wait,) = (item for item in spec.init_containers if item.name == WAIT)
    volumes = {volume.name: volume.config_map.name for volume in spec.volumes if volume.config_map}
    for mount in (item for item in wait.volume_mounts if item.name in volumes):
        for file, text in core.read_namespaced_config_map(volumes[mount.name], place).data.items():
            path = tmp_path / mount.mount_path.lstrip("/") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    shell = next(item.value for item in wait.env if item.name == "BASH_ENV")
    environment = {"PATH": os.defpath, "BASH_ENV": f"{tmp_path}{shell}"}
    done = subprocess.run([*wait.command, *wait.args], env=environment, capture_output=True, text=True, timeout=4)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    asked = ["bash", "-c", "ray stop"]
    other = subprocess.run(asked, env=environment, capture_output=True, text=True, timeout=4)
    assert "ray: command not found" in other.stderr, "its other commands are Ray's own"


def test_a_variable_that_user_and_operator_set_is_no_conflict(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods) -> None:
    """The CRD rejects a RayJob whose containers set a variable twice."""
    mine = {"name": "BASH_ENV", "value": "/mine"}
    template = {"spec": {"containers": [{"name": "trainer", "env": [mine]}]}}
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"nodes": 1, "gpusPerNode": 1, "podTemplate": template}))
    spec = pods.kubelet.core.read_namespaced_pod(pods.head(), ray_jobs.namespace).spec
    assert [item.value for item in spec.containers[0].env if item.name == "BASH_ENV"] == ["/mine"]


def test_what_kuberay_refuses_is_told_and_ends_after_a_limit(ray_jobs: Jobs, pods: Pods, api: client.ApiClient) -> None:
    """The attempts and the job fail if no KubeRay operator accepts the RayJobs, for example while it is down."""
    with KubeRayStandIn(api, ray_jobs.namespace, away=True):
        ray_jobs.create(job(kubernetes=KUBERAY, runPolicy={"backoffLimit": 0}))
        failed = ray_jobs.until_phase("Failed")
    told = condition(failed, "Failed")
    assert (told["reason"], "KubeRay has not taken the RayJob up yet" in told["message"]) == ("NotStarted", True)


def test_a_ray_job_without_a_dashboard_port_is_refused_by_the_stand_in(
    ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods
) -> None:
    """KubeRay rejects it too, and reports this only in its log."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    pods.run()
    eventually(lambda: "tiny-1" in ray_objects(ray_jobs))
    good = ray_objects(ray_jobs)["tiny-1"]
    trainer = good["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    trainer["ports"] = [port for port in trainer["ports"] if port["name"] != "dashboard"]
    body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "bad"}, "spec": good["spec"]}
    ray_jobs.api.create_namespaced_custom_object("ray.io", "v1", ray_jobs.namespace, "rayjobs", body)
    eventually(lambda: len(ray_objects(ray_jobs, "rayclusters")) == 2)
    for pod in pods.kubelet.pods(ray_jobs.namespace, 2):
        pods.kubelet.running(ray_jobs.namespace, pod)
    eventually(lambda: ray.errors["bad"] == {"dashboard port is not found"})
    ray_jobs.until_phase("Running")
    assert not ray.errors["tiny-1"]


def test_a_user_error_by_the_head_s_termination_message(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods) -> None:
    """The RayJob reports the end first, and the head pod reports the cause a moment later."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.run()
    ray_jobs.until_phase("Running")
    ray.finish("tiny-1", 2, "some line of a log")
    eventually(lambda: ray_objects(ray_jobs)["tiny-1"]["status"]["jobDeploymentStatus"] == "Failed")
    pods.end(head, 2, message='{"exitCode": 2, "message": "stages[0].data: no such file"}')
    failed = condition(ray_jobs.until_phase("Failed"), "Failed")
    assert (failed["reason"], failed["message"]) == ("UserError", "stages[0].data: no such file")


def test_memory_that_runs_out_in_the_head(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods) -> None:
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.run()
    ray_jobs.until_phase("Running")
    pods.kubelet.oom_killed(ray_jobs.namespace, head)
    failed = ray_jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == "OOMKilled"
    assert "memoryPerNode" in failed["status"]["failure"]["message"]
    eventually(
        lambda: (
            "deletionTimestamp"
            in ray_objects(ray_jobs).get("tiny-1", {"metadata": {"deletionTimestamp": 1}})["metadata"]
        )
    )


@pytest.mark.parametrize("annotated", [True, False])
def test_a_lost_head_ends_the_attempt(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods, annotated: bool) -> None:
    """Older versions of KubeRay replace a lost head; others do not."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.run()
    ray_jobs.until_phase("Running")
    if not annotated:
        ray_jobs.api.patch_namespaced_custom_object(
            "ray.io", "v1", ray_jobs.namespace, "rayjobs", "tiny-1", {"metadata": {"annotations": None}}
        )
    pods.kubelet.core.delete_namespaced_pod(head, ray_jobs.namespace, grace_period_seconds=0)
    second = ray_jobs.until(lambda status: status.get("attempt") == 2)
    assert second["status"]["attempts"][0]["reason"] == "PodDeleted"
    pods.end_all(1)
    pods.run(2)
    ray_jobs.until_phase("Running")


def test_a_queue_holds_a_ray_job(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods) -> None:
    """A queue suspends the RayJob during training, and the same attempt continues once the queue admits it."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.run()
    ray_jobs.until_phase("Running")
    _suspend(ray_jobs, True)
    held = ray_jobs.until_phase("Queued")
    assert condition(held, "Admitted")["status"] == "False"
    pods.kubelet.until_deleted(ray_jobs.namespace, head)
    pods.kubelet.end_deletion(ray_jobs.namespace, head, 75)
    eventually(lambda: ray_objects(ray_jobs)["tiny-1"]["status"]["jobDeploymentStatus"] == "Suspended")
    _suspend(ray_jobs, False)
    pods.run()
    assert [item["number"] for item in ray_jobs.until_phase("Running")["status"]["attempts"]] == [1]


def _suspend(jobs: Jobs, wanted: bool) -> None:
    body = {"spec": {"suspend": wanted}}
    jobs.api.patch_namespaced_custom_object("ray.io", "v1", jobs.namespace, "rayjobs", "tiny-1", body)


def test_a_deleted_job_leaves_nothing(ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods, core: client.CoreV1Api) -> None:
    """KubeRay needs the Secret until the RayJob is deleted; then the garbage collector deletes the Secret."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.run()
    ray_jobs.until_phase("Running")
    ray_jobs.delete()
    pods.kubelet.until_deleted(ray_jobs.namespace, head)
    pods.kubelet.end_deletion(ray_jobs.namespace, head)
    eventually(lambda: not ray_objects(ray_jobs) and not core.list_namespaced_secret(ray_jobs.namespace).items)
    assert not ray.errors["tiny-1"]


def test_a_secret_that_the_operator_did_not_get_to_make(
    ray_jobs: Jobs, pods: Pods, core: client.CoreV1Api, ray: KubeRayStandIn
) -> None:
    """The operator ended between the RayJob and its Secret: the kubelet reports the missing Secret."""
    ray_jobs.create(job(kubernetes=KUBERAY))
    head = pods.head()
    (secret,) = core.list_namespaced_secret(ray_jobs.namespace).items
    core.delete_namespaced_secret(secret.metadata.name, ray_jobs.namespace)
    pods.kubelet.config_error(ray_jobs.namespace, head, f'secret "{secret.metadata.name}" not found')
    eventually(lambda: core.list_namespaced_secret(ray_jobs.namespace).items)
    (made,) = core.list_namespaced_secret(ray_jobs.namespace).items
    kinds = [owner.kind for owner in made.metadata.owner_references]
    assert (made.metadata.name, kinds) == (secret.metadata.name, ["FineTuneJob", "RayJob"])


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
    """The RayJob is accepted with strict field validation, and its pods under the restricted Pod Security level."""
    body = job("a" * 40, kubernetes={"engine": "kuberay"}, resources=FULL)
    body["metadata"] |= {"uid": "0123abcd-0000-0000-0000-000000000000"}
    settings = Settings(token_key=b"k", ray_version="2.60.0", image="trainer:1")
    with namespace_of(admin, "strict", {"pod-security.kubernetes.io/enforce": "restricted"}) as namespace:
        body["metadata"]["namespace"] = namespace
        made = next(item for item in plan(body, (StartRun(999999),), settings) if isinstance(item, Create) and item.run)
        assert len(made.body["metadata"]["name"]) == 47
        strict = {"field_validation": "Strict", "dry_run": "All"}
        finetune_jobs.create_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", made.body, **strict)
        cluster = made.body["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            core.create_namespaced_pod(namespace, pod, **strict)


def test_the_first_container_is_ray_s(ray_jobs: Jobs) -> None:
    """KubeRay uses the first container as Ray's, under any name."""
    ray_jobs.create(job(kubernetes=KUBERAY, resources={"podTemplate": {"spec": {"containers": [SIDE]}}}))
    eventually(lambda: "tiny-1" in ray_objects(ray_jobs))
    spec = ray_objects(ray_jobs)["tiny-1"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert [item["name"] for item in spec["containers"]] == ["trainer", "side"]


def test_suspension_deletes_the_ray_job_once_its_driver_was_asked(
    ray_jobs: Jobs, ray: KubeRayStandIn, pods: Pods
) -> None:
    made = ray_jobs.create(job(kubernetes={**KUBERAY, "checkpointGraceSeconds": 20}))
    with driver(made["metadata"]["uid"], 1) as trainer:
        head = pods.run()
        ray_jobs.until_phase("Running")
        ray_jobs.patch("tiny", {"runPolicy": {"suspend": True}})
        assert trainer.asked_to_stop.wait(20)
    ray.finish("tiny-1", 75)
    pods.end(head, 75, message='{"exitCode": 75, "message": "stopped"}')
    suspended = ray_jobs.until_phase("Suspended")
    assert suspended["status"]["attempts"][0]["requested"] is True
