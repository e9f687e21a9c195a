"""The lifecycle of a job on a real API server: objects, status, and changes by its user."""

from __future__ import annotations

import json
from pathlib import Path

from kubernetes import client
from support.cluster.access import Access, namespace_of, until, until_gone
from support.cluster.finetune_jobs import Jobs, condition, driver, job
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess, eventually

from finetune_operator.core.conditions import moment
from finetune_trainer.progress.reporter import Progress

SELECTOR = "finetune.dev/job=tiny,finetune.dev/run={}"


def pods_of(kubelet: KubeletStandIn, namespace: str, run: int | str, count: int = 1) -> list[str]:
    return kubelet.pods(namespace, count, selector=SELECTOR.format(run))


def test_from_apply_to_succeeded(jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api, namespace: str) -> None:
    made = jobs.create(job(resources={"nodes": 2, "workersPerNode": 1}))
    first, second = pods_of(kubelet, namespace, 1, 2)
    config = core.list_namespaced_config_map(namespace, label_selector=SELECTOR.format(1)).items[0]
    run = json.loads(config.data["run.json"])
    assert config.immutable and run["root"] == f"/pvc/results/runs/{namespace}/tiny" and run["attempt"] == 1
    with driver(made["metadata"]["uid"], 1) as trainer:
        kubelet.running(namespace, first)
        kubelet.running(namespace, second, ip="127.0.0.2")
        jobs.until_phase("Running")
        trainer.reporter.stage_started(0, "tokenizer", 2, "")
        trainer.reporter.stage_finished(0, "tokenizer", "/pvc/t", {"bytes_per_token": 2.5})
        trainer.reporter.stage_started(1, "pretrain", 2, "")
        trainer.reporter.progress(Progress(1, 2, "pretrain", 4, 10, loss=3.25, tokens_per_second=1000.0, eta=90.0))
        trainer.reporter.checkpoint_saved(1, 4, "/pvc/c-4")
        seen = jobs.until(lambda status: status.get("step") == "4/10" and "lastCheckpoint" in status)["status"]
        assert (seen["stage"], seen["loss"], seen["eta"], seen["attempt"]) == ("2/2 pretrain", "3.25", "1m", 1)
        assert moment(seen["lastCheckpoint"].pop("savedAt")) >= moment(made["metadata"]["creationTimestamp"])
        assert seen["lastCheckpoint"] == {"stage": 1, "step": 4, "uri": "/pvc/c-4"}
        assert seen["stages"][0]["metrics"] == {"bytes_per_token": 2.5}
    kubelet.finished(namespace, first)
    done = jobs.until_phase("Succeeded")
    assert condition(done, "Succeeded")["observedGeneration"] == 1
    assert done["status"]["attempts"][0]["reason"] == "Completed"


def test_the_log_has_each_operation_and_each_attempt(
    jobs: Jobs, kubelet: KubeletStandIn, namespace: str, operator: OperatorProcess
) -> None:
    jobs.create(job())
    for number, code, message in ((1, 1, '{"exitCode": 1, "message": "RuntimeError: a crash"}'), (2, 0, "")):
        (pod,) = pods_of(kubelet, namespace, number)
        kubelet.running(namespace, pod)
        kubelet.finished(namespace, pod, code, message=message)
    jobs.until_phase("Succeeded")
    eventually(lambda: f"{namespace}/tiny: attempt 2 ended: Completed" in operator.log())
    log = operator.log()
    for kind, name in (("Job", "tiny-1"), ("Job", "tiny-2"), ("ConfigMap", "tiny-1-"), ("Secret", "tiny-2-")):
        assert f"INFO finetune_operator.apply: applied: create {kind} {namespace}/{name}" in log
    assert f"applied: patch status of finetunejobs {namespace}/tiny: phase Succeeded" in log
    lines = [line for line in log.splitlines() if f"INFO finetune_operator.controller: {namespace}/tiny: " in line]
    assert [line.partition("/tiny: ")[2] for line in lines] == [
        "attempt 1 started",
        "attempt 1 failed: TrainingFailed (exit code 1): RuntimeError: a crash",
        "attempt 2 started",
        "attempt 2 ended: Completed",
    ]


def test_a_user_error_is_told_and_never_retried(jobs: Jobs, kubelet: KubeletStandIn, namespace: str) -> None:
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    message = '{"stages": [], "exitCode": 2, "message": "stages[1].pretrain.data: no such file: x"}'
    kubelet.finished(namespace, pod, 2, message=message)
    failed = jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == "UserError"
    assert failed["status"]["failure"]["message"] == "stages[1].pretrain.data: no such file: x"
    assert failed["status"]["failure"]["pod"] == pod
    assert len(failed["status"]["attempts"]) == 1


def test_suspend_waits_for_the_checkpoint_and_resume_goes_on(
    jobs: Jobs, kubelet: KubeletStandIn, namespace: str
) -> None:
    made = jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    with driver(made["metadata"]["uid"], 1) as trainer:
        kubelet.running(namespace, pod)
        jobs.until_phase("Running")
        jobs.patch("tiny", {"runPolicy": {"suspend": True}})
        assert trainer.asked_to_stop.wait(20)
        trainer.reporter.checkpoint_saved(1, 7, "/pvc/c-7")
        trainer.reporter.ended(75, "stopped at step 7, checkpoint saved")
        said = trainer.reporter.report().model_dump_json(by_alias=True, exclude_none=True)
    kubelet.finished(namespace, pod, 75, message=said)
    suspended = jobs.until_phase("Suspended")
    assert suspended["status"]["lastCheckpoint"]["step"] == 7
    assert suspended["status"]["attempts"][0]["reason"] == "Interrupted"
    jobs.patch("tiny", {"runPolicy": {"suspend": False}})
    pods_of(kubelet, namespace, 2)
    resumed = jobs.until(lambda status: status.get("attempt") == 2)
    assert condition(resumed, "Suspended")["status"] == "False"


def test_deletion_takes_the_children_along(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    jobs.create(job())
    pods_of(kubelet, namespace, 1)
    batch, core = client.BatchV1Api(api), client.CoreV1Api(api)
    secret = core.list_namespaced_secret(namespace, label_selector=SELECTOR.format(1)).items[0]
    jobs.delete()
    until_gone(batch.list_namespaced_job, "tiny-1", namespace=namespace)
    until_gone(core.list_namespaced_secret, secret.metadata.name, namespace=namespace)


def test_preflight_comes_before_any_attempt(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    jobs.create(job(kubernetes={}))
    (pod,) = pods_of(kubelet, namespace, "preflight")
    assert jobs.until_phase("Preflight")["status"]["conditions"][1]["reason"] == "PreflightRunning"
    names = [item.metadata.name for item in client.BatchV1Api(api).list_namespaced_job(namespace).items]
    assert names == ["tiny-preflight"]
    kubelet.running(namespace, pod)
    kubelet.finished(namespace, pod, message='{"plan": {"parameters": 35936, "memoryBytes": 1073741824, "steps": 20}}')
    planned = jobs.until(lambda status: "plan" in status)
    assert condition(planned, "Planned")["message"] == "35,936 parameters, 20 steps, 1.0 GiB per worker"
    until(client.BatchV1Api(api).list_namespaced_job, lambda item: item.metadata.name == "tiny-1", namespace=namespace)


def test_storage_is_emptied_before_the_job_goes(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    jobs.create(job(storage={"uri": "pvc://results/runs", "deletionPolicy": "Delete"}))
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    assert jobs.until_phase("Running")["metadata"]["finalizers"] == ["finetune.dev/storage"]
    jobs.delete()
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod)
    (cleanup,) = pods_of(kubelet, namespace, "cleanup")
    made = client.BatchV1Api(api).read_namespaced_job("tiny-cleanup", namespace)
    assert made.spec.template.spec.containers[0].command[:2] == ["finetune", "cleanup"]
    kubelet.running(namespace, cleanup)
    kubelet.finished(namespace, cleanup)
    jobs.until_gone("tiny")


def test_a_queue_holds_an_attempt_and_takes_it_back(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, namespace: str
) -> None:
    """Kueue suspends and resumes a Job by `spec.suspend`, and the attempt stays the same."""
    batch = client.BatchV1Api(api)
    queued = job()
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    jobs.create(queued)
    (pod,) = pods_of(kubelet, namespace, 1)
    assert batch.read_namespaced_job("tiny-1", namespace).metadata.labels["kueue.x-k8s.io/queue-name"] == "gpus"
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    batch.patch_namespaced_job("tiny-1", namespace, {"spec": {"suspend": True}})
    kubelet.until_deleted(namespace, pod)
    kubelet.end_deletion(namespace, pod)
    assert condition(jobs.until_phase("Queued"), "Admitted")["status"] == "False"
    batch.patch_namespaced_job("tiny-1", namespace, {"spec": {"suspend": False}})
    (again,) = (name for name in kubelet.pods(namespace, 1, selector=SELECTOR.format(1)) if name != pod)
    kubelet.running(namespace, again)
    assert jobs.until_phase("Running")["status"]["attempt"] == 1


def test_the_token_key_is_made_once(admin: Access, core: client.CoreV1Api, tmp_path: Path) -> None:
    with namespace_of(admin, "keys") as namespace:
        settings = {"FINETUNE_OPERATOR_NAMESPACE": namespace, "FINETUNE_NAMESPACES": namespace}
        with OperatorProcess(admin, tmp_path, own_key=True, **settings):
            first = core.read_namespaced_secret("finetune-operator-token-key", namespace)
        with OperatorProcess(admin, tmp_path, own_key=True, **settings):
            second = core.read_namespaced_secret("finetune-operator-token-key", namespace)
        assert first.data == second.data and first.metadata.uid == second.metadata.uid


def test_metrics_say_how_jobs_do(
    operator: OperatorProcess, jobs: Jobs, kubelet: KubeletStandIn, namespace: str
) -> None:
    jobs.create(job())
    (pod,) = pods_of(kubelet, namespace, 1)
    kubelet.running(namespace, pod)
    jobs.until_phase("Running")
    eventually(lambda: 'finetune_jobs{phase="Running"}' in operator.metrics())
    kubelet.finished(namespace, pod, 2)
    jobs.until_phase("Failed")
    eventually(lambda: 'finetune_attempts_total{reason="UserError"}' in operator.metrics())
    assert "finetune_reconcile_seconds_count" in operator.metrics()
