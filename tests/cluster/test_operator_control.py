"""Users change a job at unusual moments on a real API server.

The moments are before it starts, during preflight, and while no operator runs.
"""

from __future__ import annotations

import json

from kubernetes import client
from support.cluster.access import Access, namespace_of, until_gone
from support.cluster.finetune_jobs import Jobs, condition, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess, eventually

from finetune_api.exit_codes import ExitCode
from finetune_operator.engines.indexed_job import HELPER_RETRIES
from finetune_trainer.progress.reporter import Progress

SELECTOR = "finetune.dev/job=tiny,finetune.dev/run={}"
PLAN = json.dumps({"plan": {"parameters": 35936, "steps": 20}})


def pods_of(kubelet: KubeletStandIn, namespace: str, run: int | str, count: int = 1) -> list[str]:
    return kubelet.pods(namespace, count, selector=SELECTOR.format(run))


def events_of(core: client.CoreV1Api, namespace: str) -> list[str]:
    """Return the reasons of the operator's events, oldest first; within one second, in the order of their messages."""
    found = core.list_namespaced_event(namespace, field_selector="reportingComponent=finetune-operator").items
    return [item.reason for item in sorted(found, key=lambda item: item.metadata.creation_timestamp)]


def test_suspended_before_it_starts(jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str) -> None:
    jobs.create(job(kubernetes={}, runPolicy={"suspend": True}))
    suspended = jobs.until_phase("Suspended")
    assert condition(suspended, "Suspended")["message"] == "no checkpoint was saved yet"
    assert client.BatchV1Api(api).list_namespaced_job(namespace).items == []
    jobs.patch("tiny", {"runPolicy": {"suspend": False}})
    pods_of(kubelet, namespace, "preflight")
    jobs.until_phase("Preflight")


def test_suspended_while_it_is_checked(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(kubernetes={}))
    (pod,) = pods_of(kubelet, namespace, "preflight")
    kubelet.running(namespace, pod)
    jobs.patch("tiny", {"runPolicy": {"suspend": True}})
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod)
    assert condition(jobs.until_phase("Suspended"), "Planned")["reason"] == "Suspended"
    jobs.patch("tiny", {"runPolicy": {"suspend": False}})
    (again,) = pods_of(kubelet, namespace, "preflight")
    assert again != pod
    kubelet.running(namespace, again)
    kubelet.finished(namespace, again, message=PLAN)
    pods_of(kubelet, namespace, 1)
    assert condition(jobs.until(lambda status: status.get("attempt") == 1), "Suspended")["reason"] == "Resumed"


def test_a_deadline_set_while_it_runs_takes_effect(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    made = jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    with driver(made["metadata"]["uid"], 1) as trainer:
        kubelet.running(namespace, pod)
        jobs.until_phase("Running")
        jobs.patch("tiny", {"runPolicy": {"activeDeadlineSeconds": 1}})
        assert trainer.asked_to_stop.wait(20)
    kubelet.finished(namespace, pod, ExitCode.INTERRUPTED.value)
    failed = jobs.until_phase("Failed")
    assert failed["status"]["failure"]["reason"] == "DeadlineExceeded"
    assert condition(failed, "Failed")["observedGeneration"] == 2


def test_deleted_while_no_operator_is_there(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, operator: OperatorProcess, namespace: str
) -> None:
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    operator.kill()
    try:
        jobs.delete()
        kubelet.until_deleted(namespace, pod)
        kubelet.end_deletion(namespace, pod)
        until_gone(client.BatchV1Api(api).list_namespaced_job, "tiny-1", namespace=namespace)
        jobs.until_gone("tiny")
    finally:
        operator.start()


def test_it_runs_on_and_is_found_again_after_an_operator_s_absence(
    jobs: Jobs, kubelet: KubeletStandIn, operator: OperatorProcess, namespace: str
) -> None:
    made = jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    with driver(made["metadata"]["uid"], 1) as trainer:
        kubelet.running(namespace, pod)
        jobs.until_phase("Running")
        operator.kill()
        trainer.reporter.checkpoint_saved(1, 5, "/pvc/c-5")
        operator.start()
        seen = jobs.until(lambda status: status.get("lastCheckpoint", {}).get("step") == 5)
    assert seen["status"]["attempt"] == 1 and seen["status"]["phase"] == "Running"
    kubelet.finished(namespace, pod)
    assert [item["reason"] for item in jobs.until_phase("Succeeded")["status"]["attempts"]] == ["Completed"]


def test_what_ends_while_no_operator_is_there_is_told_afterwards(
    jobs: Jobs, kubelet: KubeletStandIn, operator: OperatorProcess, namespace: str
) -> None:
    """The operator reads the pod's termination message after its restart."""
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    operator.kill()
    message = {"exitCode": 2, "message": "x: is wrong", "checkpoint": {"stage": 1, "step": 9, "uri": "/pvc/c-9"}}
    kubelet.finished(namespace, pod, 2, message=json.dumps(message))
    operator.start()
    failed = jobs.until_phase("Failed")["status"]
    assert failed["failure"]["message"] == "x: is wrong" and failed["lastCheckpoint"]["step"] == 9


def test_a_queue_takes_an_attempt_back_that_saves_a_checkpoint(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    """Kueue suspends the Job, its driver saves and exits with 75, and the same attempt continues later."""
    batch = client.BatchV1Api(api)
    queued = job()
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "high"}
    jobs.create(queued)
    (pod,) = pods_of(kubelet, namespace, 1)
    assert batch.read_namespaced_job("tiny-1", namespace).metadata.labels["kueue.x-k8s.io/priority-class"] == "high"
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    batch.patch_namespaced_job("tiny-1", namespace, {"spec": {"suspend": True}})
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod, ExitCode.INTERRUPTED.value)
    jobs.until_phase("Queued")
    until_gone(kubelet.core.list_namespaced_pod, pod, namespace=namespace)  # the Job controller has counted its end
    batch.patch_namespaced_job("tiny-1", namespace, {"spec": {"suspend": False}})
    (again,) = (name for name in kubelet.pods(namespace, 1, selector=SELECTOR.format(1)) if name != pod)
    kubelet.running(namespace, again)
    assert [item["number"] for item in jobs.until_phase("Running")["status"]["attempts"]] == [1]


def test_events_tell_the_story(jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str) -> None:
    made = jobs.create(job(kubernetes={}))
    (pod,) = pods_of(kubelet, namespace, "preflight")
    kubelet.running(namespace, pod)
    kubelet.finished(namespace, pod, message=PLAN)
    (first,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, first)
    jobs.until_phase("Running")
    kubelet.finished(namespace, first, 1, message='{"exitCode": 1, "message": "RuntimeError: x"}')
    (second,) = pods_of(kubelet, namespace, 2)
    with driver(made["metadata"]["uid"], 2) as trainer:
        kubelet.running(namespace, second)
        jobs.until(lambda status: status["phase"] == "Running" and status["attempt"] == 2)
        trainer.reporter.stage_started(0, "tokenizer", 2, "")
        trainer.reporter.stage_finished(0, "tokenizer", "/pvc/t", {})
        jobs.until(lambda status: (status.get("stages") or [{}])[0].get("state") == "Succeeded")
    kubelet.finished(namespace, second)
    done = jobs.until_phase("Succeeded")
    assert condition(done, "Planned")["reason"] == "PreflightPassed"
    expected = {"PreflightPassed", "Starting", "Training", "TrainingFailed", "BackOff", "StageSucceeded", "Completed"}
    eventually(lambda: set(events_of(core, namespace)) - {"Stopping"} == expected)  # may be too brief to be recorded
    told = events_of(core, namespace)
    assert (told.count("Starting"), told.count("Training"), told.count("StageSucceeded")) == (2, 2, 1)


def test_columns_of_kubectl(jobs: Jobs, kubelet: KubeletStandIn, admin: Access, namespace: str) -> None:
    """The job has the maximum number of stages, with names of the maximum length."""
    data = {"sources": [{"inline": [{"text": "to be or not to be"}] * 4}]}
    names = [f"{'s' * 37}-{n:02}" for n in range(31)]
    pretrain = {"pretrain": {"data": data, "maxSteps": 10}}
    made = jobs.create(job(stages=[job()["spec"]["stages"][0], *({"name": name, **pretrain} for name in names)]))
    (pod,) = pods_of(kubelet, namespace, 1)
    metrics = {f"{'m' * 100}{k}": 1.5 for k in range(64)}
    with driver(made["metadata"]["uid"], 1, titles=["tokenizer", *names]) as trainer:
        for index in range(3):
            trainer.reporter.stage_finished(index, "", "s3://bucket/" + "r" * 1000, metrics)
        trainer.reporter.stage_started(3, names[2], 32, "")
        trainer.reporter.progress(Progress(3, 32, names[2], 7, 10, loss=2.34567, eta=4000.0, metrics=metrics))
        kubelet.running(namespace, pod)
        jobs.until(lambda status: status.get("step") == "7/10" and status["phase"] == "Running")
        lines = admin.kubectl("get", "ftj", f"--namespace={namespace}").stdout.splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "STAGE", "STEP", "LOSS", "ETA", "ATTEMPT", "AGE"]
    assert lines[1].split()[:-1] == ["tiny", "Running", "4/32", names[2], "7/10", "2.346", "1h6m", "1"]


def test_pods_of_a_job_are_let_into_a_restricted_namespace(
    admin: Access, finetune_jobs: client.CustomObjectsApi, kubelet: KubeletStandIn, operator: OperatorProcess
) -> None:
    """The pods of preflight, driver and worker have a sidecar, an init container, RDMA and a claim."""
    side = {"name": "side", "image": "x", "restartPolicy": "Always"}
    own = {"name": "trainer", "resources": {"limits": {"rdma/ib": "1"}},
           "securityContext": {"capabilities": {"drop": ["ALL"]}}}  # fmt: skip
    template = {
        "spec": {
            "containers": [own, {"name": "log", "image": "x"}],
            "initContainers": [side, {"name": "first", "image": "x"}],
            "imagePullSecrets": [{"name": "pull"}],
            "tolerations": [{"operator": "Exists"}],
        }
    }
    with namespace_of(admin, "restricted", {"pod-security.kubernetes.io/enforce": "restricted"}) as namespace:
        restricted = Jobs(finetune_jobs, namespace)
        resources = {"nodes": 2, "gpusPerNode": 8, "podTemplate": template}
        restricted.create(job(kubernetes={"modelCacheClaim": "cache"}, resources=resources))
        (pod,) = pods_of(kubelet, namespace, "preflight")
        kubelet.running(namespace, pod)
        kubelet.finished(namespace, pod, message=PLAN)
        assert len(pods_of(kubelet, namespace, 1, 2)) == 2


def test_pods_that_may_not_be_made_are_told_of(
    admin: Access, finetune_jobs: client.CustomObjectsApi, core: client.CoreV1Api, kubelet: KubeletStandIn,
    operator: OperatorProcess,
) -> None:  # fmt: skip
    """The Job exists but its pods are rejected, which only the events of the Job controller explain."""
    with namespace_of(admin, "quota") as namespace:
        held = Jobs(finetune_jobs, namespace)
        spec = client.V1ResourceQuotaSpec(hard={"pods": "0"})
        core.create_namespaced_resource_quota(namespace, client.V1ResourceQuota(metadata={"name": "none"}, spec=spec))
        kubelet.until_quota(namespace, "none")
        held.create(job())
        seen = held.until(lambda status: "exceeded quota" in str(status.get("conditions")))
        assert condition(seen, "Running")["reason"] == "Forbidden" and seen["status"]["phase"] == "Pending"
        core.delete_namespaced_resource_quota("none", namespace)
        # The Job controller retries with pauses that double.
        (pod,) = kubelet.pods(namespace, 1, selector=SELECTOR.format(1), timeout=90)
        kubelet.running(namespace, pod)
        assert condition(held.until_phase("Running"), "Running")["message"] == ""


def test_a_volume_that_cannot_be_mounted_is_told_of(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.scheduled(namespace, pod)
    kubelet.event(namespace, pod, "FailedMount", 'MountVolume.SetUp failed for volume "x": secret "x" not found')
    seen = jobs.until(lambda status: "FailedMount" in str(status.get("conditions")))
    assert condition(seen, "Running")["reason"] == "PodConfigError"


def test_a_preflight_that_could_not_be_made_to_work(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    """Kubernetes retries the preflight; the last pod counts."""
    jobs.create(job(kubernetes={}))
    done: set[str] = set()
    while len(done) <= HELPER_RETRIES:
        (pod,) = set(pods_of(kubelet, namespace, "preflight", len(done) + 1)) - done
        kubelet.running(namespace, pod)
        kubelet.finished(namespace, pod, 1, message='{"exitCode": 1, "message": "ConnectionError: the hub is away"}')
        done.add(pod)
    failed = jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == condition(failed, "Planned")["reason"] == "PreflightFailed"
    assert "the hub is away" in failed["status"]["failure"]["message"]


def test_storage_that_cannot_be_emptied_is_told_of(
    jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str
) -> None:
    jobs.create(job(storage={"uri": "pvc://results/runs", "deletionPolicy": "Delete"}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    jobs.delete()
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod)
    (cleanup,) = pods_of(kubelet, namespace, "cleanup")
    assert jobs.until_phase("Deleting")
    kubelet.running(namespace, cleanup)
    kubelet.finished(namespace, cleanup, ExitCode.USER_ERROR.value)
    jobs.until_gone("tiny")
    assert "CleanupFailed" in events_of(core, namespace)


def test_a_missing_secret_is_told_of_and_waited_for(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(kubernetes={"preflight": False, "envFromSecrets": ["hub"]}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.config_error(namespace, pod, 'secret "hub" not found')
    seen = jobs.until(lambda status: "PodConfigError" in str(status.get("conditions")))
    assert 'secret "hub" not found' in condition(seen, "Running")["message"]
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")


def test_an_elastic_job_runs_with_its_least(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job(resources={"minNodes": 2, "maxNodes": 3}))
    first, second, third = pods_of(kubelet, namespace, 1, 3)
    kubelet.running(namespace, first)
    kubelet.unschedulable(namespace, third, "0/2 nodes are available: 2 Insufficient cpu.")
    kubelet.running(namespace, second, ip="127.0.0.2")
    running = jobs.until_phase("Running")
    assert condition(running, "Running")["message"] == "0/2 nodes are available: 2 Insufficient cpu."


def test_a_policy_that_cannot_be_asked_is_told_of_and_waited_for(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    registration = client.AdmissionregistrationV1Api(api)
    webhook = {
        "name": "away.example.org",
        "clientConfig": {"url": "https://127.0.0.1:9/"},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    made = {"metadata": {"name": namespace}, "webhooks": [webhook]}
    registration.create_validating_webhook_configuration(made)
    try:
        eventually(lambda: _refused(jobs, api))
        jobs.create(job())
        seen = jobs.until(lambda status: "Forbidden" in str(status.get("conditions")))
        assert "failed calling webhook" in condition(seen, "Running")["message"]
    finally:
        registration.delete_validating_webhook_configuration(namespace)
    pods_of(kubelet, namespace, 1)


def _refused(jobs: Jobs, api: client.ApiClient) -> bool:
    """Whether the API server already calls the webhook."""
    pod = {"spec": {"containers": [{"name": "x", "image": "x"}], "restartPolicy": "Never"}}
    body = {"metadata": {"name": "probe"}, "spec": {"template": pod}}
    try:
        client.BatchV1Api(api).create_namespaced_job(jobs.namespace, body, dry_run="All")
    except client.ApiException as error:
        return "failed calling webhook" in error.body
    return False
