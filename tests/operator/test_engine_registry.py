"""The registered engines describe their objects and pods, and decisions use the engine of the job."""

from __future__ import annotations

from typing import Any

import pytest
from support.operator.worlds import UID, ago, body

from finetune_api.labels import DRIVER, ROLE_LABEL, WORKER
from finetune_operator.core.settings import Settings
from finetune_operator.decide.actions import StartRun
from finetune_operator.engines import ENGINES
from finetune_operator.engines.registry import check_engines, facts, observe_pod, observe_run
from finetune_operator.plan import Create, plan

Json = dict[str, Any]
LABELS = {"finetune.dev/job": "tiny", "finetune.dev/run": "1"}
INDEX = "batch.kubernetes.io/job-completion-index"
RAY_TYPE = "ray.io/node-type"
PODS = {
    "a Job's second pod": ("Job", {INDEX: "1"}, (1, "u")),
    "a helper's pod": ("Job", {}, (0, "u")),
    "KubeRay's head": ("RayCluster", {RAY_TYPE: "head"}, (0, "n")),
    "KubeRay's worker": ("RayCluster", {RAY_TYPE: "worker"}, (1, "n")),
    "of another controller": ("ReplicaSet", {INDEX: "1", RAY_TYPE: "worker"}, (0, "u")),
    "of no controller": ("", {INDEX: "1"}, (0, "")),
}


@pytest.mark.parametrize("case", PODS)
def test_which_node_a_pod_is_and_what_created_it(case: str) -> None:
    kind, labels, expected = PODS[case]
    metadata: Json = {"name": "p", "labels": LABELS | labels}
    if kind:
        metadata["ownerReferences"] = [{"kind": kind, "name": "n", "uid": "u", "controller": True}]
    pod = observe_pod({"metadata": metadata, "status": {}})
    assert pod is not None and (pod.index, pod.owner) == expected


def test_each_engine_reads_its_own_kind_alone() -> None:
    for engine in ENGINES.values():
        job = body(kubernetes={"preflight": False, "engine": engine.name})
        (main,) = (item for item in plan(job, (StartRun(1),), Settings()) if isinstance(item, Create) and item.run)
        main.body["metadata"] |= {"creationTimestamp": ago(1), "uid": UID}
        run = observe_run(main.body)
        assert run is not None and (run.engine, run.job, run.run) == (engine.name, "tiny", 1)
        assert main.path == engine.collection("team") and engine.made(main.body)
    assert observe_run({"kind": "Pod", "apiVersion": "v1", "metadata": {"labels": LABELS}}) is None


def test_a_job_whose_pods_are_gone_still_says_that_one_was_evicted() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "lastTransitionTime": ago(1)}
    message = "Pod team/tiny-1-0-x matches FailJob rule at index 1 with condition DisruptionTarget"
    metadata = {"name": "tiny-1", "labels": LABELS, "creationTimestamp": ago(9)}
    for text, disrupted in ((message, True), ("Container trainer failed with exit code 2", False)):
        job = {"metadata": metadata, "status": {"conditions": [failed | {"message": text}]}}
        run = ENGINES["job"].observe(job)
        assert run is not None and run.disrupted is disrupted


def test_why_an_engine_is_not_available() -> None:
    spec = body(kubernetes={"engine": "kuberay"})["spec"]
    assert facts(spec, Settings(), ENGINES).missing == ""
    expected = "kubernetes.engine is kuberay, but this cluster has no ray.io/v1 RayJob: install KubeRay, or use job"
    assert facts(spec, Settings(), ["job"]).missing == expected
    assert "switch off" in facts(spec, Settings(engines=("job",)), ["job"]).missing


def test_the_default_engine_is_the_first_unless_the_settings_name_one() -> None:
    spec = body(kubernetes={"engine": "auto"})["spec"]
    assert facts(spec, Settings(), ["job"]).missing == ""
    assert "RayJob" in facts(spec, Settings(default_engine="kuberay"), ["job"]).missing


@pytest.mark.parametrize("settings", [Settings(default_engine="slurm"), Settings(engines=("job", "slurm"))])
def test_settings_that_name_an_unknown_engine_are_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"'slurm', expected one of job, kuberay"):
        check_engines(settings)


def test_pods_that_their_engine_does_not_number_have_a_role() -> None:
    """`finetune logs` finds the driver's pod by its role."""
    job = body(kubernetes={"preflight": False, "engine": "kuberay"}, resources={"nodes": 2})
    (main,) = (item for item in plan(job, (StartRun(1),), Settings()) if isinstance(item, Create) and item.run)
    cluster = main.body["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert [group["template"]["metadata"]["labels"][ROLE_LABEL] for group in groups] == [DRIVER, WORKER]
