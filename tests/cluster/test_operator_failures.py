"""Each class of failure on a real API server has its status, and is retried or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from kubernetes import client
from support.cluster.finetune_jobs import Jobs, condition, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn

SELECTOR = "finetune.dev/job=tiny,finetune.dev/run={}"
Happening = Callable[[KubeletStandIn, str, str], None]


def pods_of(kubelet: KubeletStandIn, namespace: str, run: int, count: int = 1) -> list[str]:
    return kubelet.pods(namespace, count, selector=SELECTOR.format(run))


def ended(code: int, message: str) -> Happening:
    said = json.dumps({"stages": [], "exitCode": code, "message": message})
    return lambda kubelet, namespace, pod: kubelet.finished(namespace, pod, code, message=said)


@dataclass(frozen=True)
class Case:
    reason: str
    happens: Happening
    says: str
    retried: bool


CASES = [
    Case(
        "OOMKilled", lambda k, ns, pod: k.oom_killed(ns, pod), "Set resources.memoryPerNode to 12Gi (it is 8Gi)", False
    ),
    Case(
        "CUDAOutOfMemory",
        ended(3, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        "Set stages[1].pretrain.perDeviceTrainBatchSize to 4 (it is 8) and "
        "stages[1].pretrain.gradientAccumulationSteps to 2",
        False,
    ),
    Case("UserError", ended(2, "stages[1].pretrain.data: is empty"), "stages[1].pretrain.data: is empty", False),
    Case(
        "GateNotPassed",
        ended(4, "stages[1].evaluate.gate[0]: exactMatch is 0.1, expected at least 0.9 (sft)"),
        "stages[1].evaluate.gate[0]: exactMatch is 0.1, expected at least 0.9 (sft)",
        False,
    ),
    Case("Evicted", lambda k, ns, pod: k.evicted(ns, pod), "low on resource: memory", True),
    Case("Evicted", lambda k, ns, pod: k.preempted(ns, pod), "PreemptionByScheduler", True),
    Case("Evicted", lambda k, ns, pod: k.drained(ns, pod), "EvictionByEvictionAPI", True),
    Case("NodeLost", lambda k, ns, pod: k.node_lost("lost-node"), "DeletionByTaintManager", True),
    Case("PodDeleted", lambda k, ns, pod: k.deleted_by_force(ns, pod), "was deleted while it ran", True),
    Case("RendezvousFailed", ended(1, "torch.distributed.DistStoreError: Timed out"), "DistStoreError", True),
    Case(
        "CUDADeviceAssert", ended(1, "AcceleratorError: CUDA error: device-side assert triggered"), "vocab_size", False
    ),
    Case("Interrupted", ended(75, "stopped at step 3, checkpoint saved"), "stopped at step 3", True),
    Case("TrainingFailed", ended(1, "RuntimeError: what nobody expects"), "what nobody expects", True),
    Case("ImagePullFailed", lambda k, ns, pod: k.image_pull_back_off(ns, pod), "ImagePullBackOff", True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.reason}-{case.says[:18]}")
def test_each_class_of_failure(case: Case, jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(resources={"memoryPerNode": "8Gi"}))
    (pod,) = pods_of(kubelet, namespace, 1)
    if case.reason != "ImagePullFailed":
        kubelet.running(namespace, pod, node="lost-node" if case.reason == "NodeLost" else "node-a")
        jobs.until_phase("Running")
    case.happens(kubelet, namespace, pod)
    if case.reason == "ImagePullFailed":
        stuck = jobs.until(lambda status: "ImagePullBackOff" in str(status.get("conditions")))
        assert condition(stuck, "Running")["reason"] == "ImagePullFailed"
        kubelet.until_deleted(namespace, pod)
        kubelet.end_deletion(namespace, pod)
    if case.retried:
        pods_of(kubelet, namespace, 2)
        seen = jobs.until(lambda status: status.get("attempt") == 2)
    else:
        seen = jobs.until_phase("Failed")
        assert condition(seen, "Failed")["reason"] == case.reason
        assert case.says in condition(seen, "Failed")["message"]
        assert len(seen["status"]["attempts"]) == 1
    assert seen["status"]["attempts"][0]["reason"] == case.reason
    assert case.says in seen["status"]["attempts"][0]["message"]


def test_a_worker_s_end_outweighs_what_the_driver_saw(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(resources={"nodes": 2, "memoryPerNode": "8Gi"}))
    first, second = pods_of(kubelet, namespace, 1, 2)
    kubelet.running(namespace, first)
    kubelet.running(namespace, second, node="node-b")
    jobs.until_phase("Running")
    kubelet.oom_killed(namespace, second)
    kubelet.until_deleted(namespace, first)
    kubelet.end_deletion(namespace, first)
    failed = jobs.until_phase("Failed")
    assert failed["status"]["failure"]["reason"] == "OOMKilled"
    assert (failed["status"]["failure"]["pod"], failed["status"]["failure"]["node"]) == (second, "node-b")


def test_a_broken_gpu_s_node_is_kept_away_from(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    """The driver names the node of the failed worker, and the API server accepts the pod of the next attempt."""
    jobs.create(job(resources={"nodes": 2, "gpusPerNode": 1}))
    first, second = pods_of(kubelet, namespace, 1, 2)
    kubelet.running(namespace, first)
    kubelet.running(namespace, second, node="node-b")
    jobs.until_phase("Running")
    fault = "GPU fault on node node-b: AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    said = json.dumps({"stages": [], "exitCode": 1, "message": fault, "node": "node-b"})
    kubelet.finished(namespace, first, 1, message=said)
    kubelet.until_deleted(namespace, second)
    kubelet.end_deletion(namespace, second)
    record = jobs.until(lambda status: status.get("attempt") == 2)["status"]["attempts"][0]
    assert (record["reason"], record["faultyNode"]) == ("GPUFault", "node-b")
    for pod in pods_of(kubelet, namespace, 2, 2):
        spec = kubelet.core.read_namespaced_pod(pod, namespace).spec
        (term,) = spec.affinity.node_affinity.required_during_scheduling_ignored_during_execution.node_selector_terms
        (field,) = term.match_fields
        assert (field.key, field.operator, field.values) == ("metadata.name", "NotIn", ["node-b"])


def test_what_the_scheduler_misses_is_told_and_waited_for(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(resources={"gpusPerNode": 8}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.unschedulable(namespace, pod, "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    seen = jobs.until(lambda status: "Unschedulable" in str(status.get("conditions")))
    assert condition(seen, "Running")["message"] == "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    kubelet.running(namespace, pod)
    assert condition(jobs.until_phase("Running"), "Running")["reason"] == "Training"


def test_attempts_without_progress_are_counted_and_progress_sets_the_count_back(
    jobs: Jobs, kubelet: KubeletStandIn, namespace: str
) -> None:
    made = jobs.create(job(runPolicy={"backoffLimit": 1}))
    for attempt, step, word in ((1, None, "first"), (2, 5, "second"), (3, 5, "third")):
        (pod,) = pods_of(kubelet, namespace, attempt)
        with driver(made["metadata"]["uid"], attempt) as trainer:
            kubelet.running(namespace, pod)
            jobs.until(lambda status, n=attempt: status["phase"] == "Running" and status["attempt"] == n)  # type: ignore[misc]
            if step:
                trainer.reporter.checkpoint_saved(1, step, f"/pvc/c-{step}")
                jobs.until(lambda status, n=step: status.get("lastCheckpoint", {}).get("step") == n)  # type: ignore[misc]
        ended(1, f"RuntimeError: the {word} crash")(kubelet, namespace, pod)  # the same error twice would be final
    failed = jobs.until_phase("Failed")
    assert len(failed["status"]["attempts"]) == 3
    assert "2 attempts without progress (backoffLimit 1)" in condition(failed, "Failed")["message"]


def test_a_deleted_job_object_is_made_again(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    client.BatchV1Api(api).delete_namespaced_job("tiny-1", namespace, propagation_policy="Background")
    kubelet.end_deletion(namespace, pod)
    pods_of(kubelet, namespace, 2)
    assert jobs.until(lambda status: status.get("attempt") == 2)["status"]["attempts"][0]["reason"] == "RunDeleted"


def test_the_deadline_asks_for_a_checkpoint_and_then_fails_the_job(
    jobs: Jobs, kubelet: KubeletStandIn, namespace: str
) -> None:
    made = jobs.create(job(runPolicy={"activeDeadlineSeconds": 2}))
    (pod,) = pods_of(kubelet, namespace, 1)
    with driver(made["metadata"]["uid"], 1) as trainer:
        kubelet.running(namespace, pod)
        assert trainer.asked_to_stop.wait(20)
    ended(75, "stopped at step 3, checkpoint saved")(kubelet, namespace, pod)
    failed = jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == "DeadlineExceeded"


def test_a_deaf_driver_is_stopped_after_its_grace_period(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(kubernetes={"preflight": False, "checkpointGraceSeconds": 1}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    jobs.patch("tiny", {"runPolicy": {"suspend": True}})
    jobs.until(lambda status: status["phase"] == "Stopping")
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod)
    suspended = jobs.until_phase("Suspended")
    assert suspended["status"]["attempts"][0]["reason"] == "Suspended"


def test_a_finished_job_goes_when_its_time_is_up(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(runPolicy={"ttlSecondsAfterFinished": 600}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    kubelet.finished(namespace, pod)
    jobs.until_phase("Succeeded")
    jobs.patch("tiny", {"runPolicy": {"ttlSecondsAfterFinished": 1}})
    jobs.until_gone("tiny")


@pytest.mark.parametrize(
    ("spec", "reason", "says"),
    [
        ({"storage": {"path": "runs"}}, "InvalidSpec", "storage.path: is 'runs'"),
        ({"storage": {"path": "/data/../etc"}}, "InvalidSpec", "absolute path on a volume"),
        (
            {"resources": {"podTemplate": {"spec": {"hostNetwork": True, "serviceAccountName": "admin"}}}},
            "PodTemplateRefused",
            "resources.podTemplate.spec.hostNetwork: is not allowed",
        ),
        (
            {"resources": {"podTemplate": {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}}}},
            "PodTemplateRefused",
            "volumes[0].hostPath: is not allowed",
        ),
        ({"resources": {"podTemplate": {"spec": {"nodeSelector": {"a": [1]}}}}}, "Rejected", "Job tiny-1"),
    ],
)
def test_what_only_the_operator_can_refuse(spec: dict[str, object], reason: str, says: str, jobs: Jobs) -> None:
    jobs.create(job(**spec))
    failed = jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == reason
    assert says in condition(failed, "Failed")["message"]


def test_kuberay_where_there_is_none_is_a_condition(jobs: Jobs) -> None:
    jobs.create(job(kubernetes={"preflight": False, "engine": "kuberay"}))
    seen = jobs.until(lambda status: "EngineMissing" in str(status.get("conditions")))
    assert "install KubeRay" in condition(seen, "Running")["message"]


def test_a_quota_is_told_and_the_attempt_starts_when_it_is_lifted(
    jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str
) -> None:
    spec = client.V1ResourceQuotaSpec(hard={"count/jobs.batch": "0"})
    quota = client.V1ResourceQuota(metadata=client.V1ObjectMeta(name="none"), spec=spec)
    core.create_namespaced_resource_quota(namespace, quota)
    kubelet.until_quota(namespace, "none")
    jobs.create(job())
    seen = jobs.until(lambda status: "Forbidden" in str(status.get("conditions")))
    assert "exceeded quota" in condition(seen, "Running")["message"]
    core.delete_namespaced_resource_quota("none", namespace)
    pods_of(kubelet, namespace, 1)
