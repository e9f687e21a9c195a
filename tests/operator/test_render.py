"""Both engines render the objects of a run with the user's pod template, within limits."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import pytest
from support.operator.worlds import UID, body

from finetune_api.runconfig import RunConfig
from finetune_operator.core import names
from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import RunState
from finetune_operator.decide.actions import DeleteRun, StartRun
from finetune_operator.engines import ENGINES
from finetune_operator.plan import Create, owned_by, patch_status, plan
from finetune_operator.render.run import Run

SETTINGS = Settings(token_key=b"k", ray_version="2.60.0", image="trainer:1")
Json = dict[str, Any]


def objects(number: int = 1, settings: Settings = SETTINGS, **spec: Any) -> dict[str, Json]:
    """Return the manifests of a run by kind."""
    made = plan(body(**spec), (StartRun(number),), settings)
    return {item.body["kind"]: item.body for item in made if isinstance(item, Create)}


def pod_spec(**spec: Any) -> Json:
    found: Json = objects(**spec)["Job"]["spec"]["template"]["spec"]
    return found


def trainer(spec: Json) -> Json:
    return next(item for item in spec["containers"] if item["name"] == "trainer")


def test_the_run_itself_comes_last_and_all_is_owned() -> None:
    made = plan(body(), (StartRun(1),), SETTINGS)
    kinds = [item.body["kind"] for item in made if isinstance(item, Create)]
    assert kinds == ["ConfigMap", "Secret", "Service", "Job"]
    for item in made:
        assert isinstance(item, Create)
        (owner,) = item.body["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"]) == (UID, True)


def test_rendering_twice_gives_the_same() -> None:
    assert objects() == objects()


def test_a_pod_is_a_node_with_all_its_gpus() -> None:
    job = objects(resources={"nodes": 4, "gpusPerNode": 8, "cpusPerNode": "64", "memoryPerNode": "512Gi"})["Job"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (4, 4, 0)
    assert job["spec"]["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    resources = trainer(job["spec"]["template"]["spec"])["resources"]
    assert resources["limits"] == {"memory": "512Gi", "nvidia.com/gpu": "8"}
    assert resources["requests"] == {"cpu": "64", "memory": "512Gi"}


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"gpusPerNode": 2}, "2049Mi"),
        ({"gpusPerNode": 2, "memoryPerNode": "64Gi"}, "64Gi"),
        ({"workersPerNode": 2}, None),
    ],
)
def test_a_gpu_pod_requests_the_planned_host_memory_where_the_user_names_none(
    resources: Json, expected: str | None
) -> None:
    job = body(resources=resources) | {"status": {"plan": {"parameters": 1, "hostBytes": 2**31 + 1}}}
    made = [item.body for item in plan(job, (StartRun(1),), SETTINGS) if isinstance(item, Create)]
    found = trainer(made[-1]["spec"]["template"]["spec"])["resources"]
    assert found["requests"].get("memory") == expected
    assert found["limits"].get("memory") == resources.get("memoryPerNode")


def test_a_template_s_own_memory_stays() -> None:
    template = {"spec": {"containers": [{"name": "trainer", "resources": {"limits": {"memory": "9Gi"}}}]}}
    job = body(resources={"gpusPerNode": 1, "podTemplate": template})
    job |= {"status": {"plan": {"parameters": 1, "hostBytes": 2**31}}}
    made = [item.body for item in plan(job, (StartRun(1),), SETTINGS) if isinstance(item, Create)]
    found = trainer(made[-1]["spec"]["template"]["spec"])["resources"]
    assert "memory" not in found["requests"] and found["limits"]["memory"] == "9Gi"


def test_the_user_s_template_stays_and_the_operator_s_part_is_added() -> None:
    own = {
        "name": "trainer",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HOME", "value": "/root"}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "resources": {"limits": {"rdma/ib": "1"}},
    }
    template = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"operator": "Exists"}],
            "containers": [own, {"name": "sidecar", "image": "x"}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "d"}}],
        },
    }
    made = objects(resources={"podTemplate": template, "gpusPerNode": 1})["Job"]["spec"]["template"]
    spec, container = made["spec"], trainer(made["spec"])
    assert made["metadata"]["labels"]["team"] == "a" and made["metadata"]["annotations"] == {"note": "b"}
    assert spec["nodeSelector"] == {"gpu": "h100"} and spec["tolerations"] == [{"operator": "Exists"}]
    assert [item["name"] for item in spec["containers"]] == ["trainer", "sidecar"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert env["NCCL_DEBUG"] == "INFO" and env["HOME"] == "/tmp"
    assert container["resources"]["limits"] == {"rdma/ib": "1", "nvidia.com/gpu": "1"}
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    assert container["image"] == "trainer:1"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ([], ["not-ready", "unreachable"]),
        ([{"key": "gpu", "operator": "Exists"}], ["not-ready", "unreachable"]),
        ([{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}], ["not-ready", "unreachable"]),
        ([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 900}], ["not-ready"]),
        ([{"operator": "Exists", "effect": "NoSchedule"}], ["not-ready", "unreachable"]),
        ([{"operator": "Exists"}], []),
    ],
)
def test_a_node_may_be_away_for_two_minutes_where_the_user_says_nothing(given: list[Any], added: list[str]) -> None:
    spec = objects(resources={"podTemplate": {"spec": {"tolerations": given}}})["Job"]["spec"]["template"]["spec"]
    own = [item for item in spec["tolerations"] if item not in given]
    assert [item["key"] for item in own] == [f"node.kubernetes.io/{name}" for name in added]
    assert all((item["effect"], item["tolerationSeconds"]) == ("NoExecute", 120) for item in own)


def test_pods_meet_the_restricted_standard() -> None:
    spec = pod_spec()
    container = trainer(spec)
    assert spec["securityContext"]["runAsNonRoot"] and spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_capability_for_rdma_leaves_the_others_dropped() -> None:
    own = {"name": "trainer", "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}
    template = {
        "metadata": {"annotations": {"k8s.v1.cni.cncf.io/networks": "rdma-net", "note": "b"}},
        "spec": {"containers": [own | {"resources": {"limits": {"rdma/hca": "1"}}}]},
    }
    made = objects(resources={"podTemplate": template, "gpusPerNode": 1})["Job"]["spec"]["template"]
    context = trainer(made["spec"])["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
    assert made["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma-net", "note": "b"}
    assert trainer(made["spec"])["resources"]["limits"]["rdma/hca"] == "1"
    checked = objects(0, resources={"podTemplate": template, "gpusPerNode": 1})["Job"]["spec"]["template"]
    assert checked["metadata"]["annotations"] == {"note": "b"}, "a preflight has no adapter"


def test_secrets_come_by_reference_alone() -> None:
    made = objects(kubernetes={"envFromSecrets": ["hub", "s3"], "preflight": False})
    container = trainer(made["Job"]["spec"]["template"]["spec"])
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}, {"secretRef": {"name": "s3"}}]
    token = made["Secret"]["stringData"]["auth_token"]
    assert len(token) == 64 and token not in json.dumps({kind: item for kind, item in made.items() if kind != "Secret"})


def test_tokens_differ_by_run_and_job() -> None:
    first, second = (objects(number)["Secret"]["stringData"]["auth_token"] for number in (1, 2))
    assert first != second


def test_claims_are_mounted_where_the_run_config_says() -> None:
    data = {"sources": [{"inline": [{"text": "a b c"}]}, {"uri": "pvc://corpus/*.jsonl"}]}
    stages = [{"pretrain": {"data": data, "maxSteps": 10}}]
    made = objects(storage={"uri": "pvc://results/a/b"}, model={"uri": "pvc://models/llama"}, stages=stages)
    config = RunConfig.model_validate_json(made["ConfigMap"]["data"]["run.json"])
    assert config.root == "/pvc/results/a/b/team/tiny"
    mounts = {item["mountPath"] for item in trainer(made["Job"]["spec"]["template"]["spec"])["volumeMounts"]}
    assert {"/pvc/results", "/pvc/models", "/pvc/corpus"} <= mounts


def test_a_cache_of_the_attempt_s_own_has_a_size_and_a_node_with_room() -> None:
    pod = pod_spec(kubernetes={"cacheSizeLimit": "500Gi", "preflight": False})
    cache = next(volume for volume in pod["volumes"] if volume["name"] == "finetune-cache")
    assert cache["emptyDir"] == {"sizeLimit": "500Gi"}
    assert trainer(pod)["resources"]["requests"]["ephemeral-storage"] == "500Gi"
    own = {"name": "trainer", "resources": {"requests": {"ephemeral-storage": "9Gi"}}}
    template = {"spec": {"containers": [own]}}
    given = pod_spec(kubernetes={"cacheSizeLimit": "500Gi"}, resources={"podTemplate": template})
    assert trainer(given)["resources"]["requests"]["ephemeral-storage"] == "9Gi"
    assert "ephemeral-storage" not in trainer(pod_spec())["resources"]["requests"]


def test_the_model_cache_is_shared_by_attempts() -> None:
    volumes = pod_spec(kubernetes={"modelCacheClaim": "cache", "preflight": False})["volumes"]
    cache = next(item for item in volumes if item["name"] == "finetune-cache")
    assert cache["persistentVolumeClaim"] == {"claimName": "cache"}


def test_a_preflight_takes_no_gpu_and_no_gpu_node() -> None:
    template = {
        "spec": {
            "nodeSelector": {"gpu": "h100", "kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": "a"},
            "resourceClaims": [{"name": "gpus", "resourceClaimName": "gpus"}],
            "schedulingGates": [{"name": "a.b/c"}],
            "containers": [
                {"name": "trainer", "resources": {"claims": [{"name": "gpus"}], "limits": {"rdma/ib": "1"}}}
            ],
        }
    }
    made = objects(0, resources={"nodes": 2, "gpusPerNode": 8, "podTemplate": template}, kubernetes={})
    spec = made["Job"]["spec"]["template"]["spec"]
    assert set(made) == {"ConfigMap", "Job"} and not {"resourceClaims", "schedulingGates"} & set(spec)
    assert spec["nodeSelector"] == {"kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": "a"}
    assert trainer(spec)["resources"]["limits"] == {"memory": "4Gi"}


def test_names_at_their_limit() -> None:
    long = body()
    long["metadata"]["name"] = "a" * 40
    for number in (0, 99999):
        for item in plan(long, (StartRun(number),), SETTINGS):
            assert isinstance(item, Create)
            assert len(item.body["metadata"]["name"]) <= (47 if item.run and number else 63)


def test_a_network_policy_lets_in_the_run_and_the_operator() -> None:
    settings = Settings(token_key=b"k", network_policy=True, operator_namespace="ops")
    policy = objects(settings=settings)["NetworkPolicy"]["spec"]
    own = {"podSelector": {"matchLabels": names.labels("tiny", 1)}}
    assert policy["podSelector"] == own["podSelector"] and policy["ingress"][0] == {"from": [own]}
    assert policy["ingress"][1]["ports"] == [{"port": 8469}]


def test_a_variable_of_the_user_s_is_set_once_under_kuberay() -> None:
    """KubeRay's CRD rejects a container that sets a variable twice."""
    mine = {"name": "BASH_ENV", "value": "/mine"}
    template = {"spec": {"containers": [{"name": "trainer", "env": [mine, {"name": "RAY_AUTH_MODE", "value": "x"}]}]}}
    made = objects(kubernetes={"engine": "kuberay"}, resources={"nodes": 2, "podTemplate": template})["RayJob"]
    cluster = made["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        env = trainer(group["template"]["spec"])["env"]
        assert len({item["name"] for item in env}) == len(env) and mine in env


def test_kuberay_may_submit_the_driver() -> None:
    settings = Settings(token_key=b"k", network_policy=True, operator_namespace="ops", default_engine="kuberay")
    rule = objects(settings=settings)["NetworkPolicy"]["spec"]["ingress"][2]
    assert rule["ports"] == [{"port": 8265}]


def test_a_ray_job_by_kuberay_s_rules() -> None:
    made = objects(kubernetes={"engine": "kuberay"}, resources={"nodes": 3, "gpusPerNode": 8})["RayJob"]
    spec = made["spec"]
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (0, True)
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    for params in (group["rayStartParams"], cluster["headGroupSpec"]["rayStartParams"]):
        assert shlex.split(params["resources"]) == ['{"finetune_worker": 8}'] and int(params["num-cpus"]) >= 64
    marks = made["metadata"]["annotations"]
    assert marks["ray.io/overwrite-container-cmd"] == marks["ray.io/disable-provisioned-head-restart"] == "true"
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        container = template["spec"]["containers"][0]
        assert container["command"][:2] == ["finetune", "node"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert "dashboard" in [port["name"] for port in container["ports"]]
        assert not any(item["name"].startswith("RAY_AUTH") for item in container["env"])


def test_kuberay_takes_the_attempt_s_own_token() -> None:
    made = objects(kubernetes={"engine": "kuberay"})
    auth = made["RayJob"]["spec"]["rayClusterSpec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": made["Secret"]["metadata"]["name"]}
    assert list(made["Secret"]["stringData"]) == ["auth_token"]


def test_a_ray_job_owns_its_secret_which_comes_after_it() -> None:
    """KubeRay reads the Secret while the RayJob is being deleted."""
    made = plan(body(kubernetes={"engine": "kuberay"}), (StartRun(1),), SETTINGS)
    secret = made[-1]
    assert isinstance(secret, Create) and secret.with_run and secret.body["kind"] == "Secret"
    ray_job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "tiny-1", "uid": "u"}}
    owners = owned_by(secret, ray_job).body["metadata"]["ownerReferences"]
    assert [(owner["kind"], owner["uid"], owner["controller"]) for owner in owners] == [
        ("FineTuneJob", UID, True),
        ("RayJob", "u", False),
    ]


def test_an_elastic_ray_job_begins_with_its_least() -> None:
    made = objects(kubernetes={"engine": "kuberay"}, resources={"minNodes": 2, "maxNodes": 5})["RayJob"]
    (group,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)


def ray_job(status: Json, **spec: Any) -> Json:
    made = objects(kubernetes={"engine": "kuberay"})["RayJob"]
    made["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    return {**made, "spec": {**made["spec"], **spec}, "status": status}


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, RunState.PENDING),
        ({"jobDeploymentStatus": "Initializing"}, RunState.PENDING),
        ({"jobDeploymentStatus": "Running"}, RunState.PENDING),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, RunState.RUNNING),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, RunState.SUCCEEDED),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, RunState.FAILED),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, RunState.FAILED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, RunState.FAILED),
        ({"jobDeploymentStatus": "ValidationFailed"}, RunState.FAILED),
        ({"jobDeploymentStatus": "Suspended"}, RunState.PENDING),
    ],
)
def test_the_states_of_a_ray_job(status: Json, state: RunState) -> None:
    view = ENGINES["kuberay"].observe(ray_job(status))
    assert view is not None and view.state is state


@pytest.mark.parametrize("deployment", ["", "Initializing", "Running", "Suspending", "Suspended"])
def test_a_queue_holds_a_suspended_ray_job(deployment: str) -> None:
    view = ENGINES["kuberay"].observe(ray_job({"jobDeploymentStatus": deployment}, suspend=True))
    assert view is not None and view.state is RunState.QUEUED


def test_what_a_ray_job_waits_for_is_in_kuberay_s_words() -> None:
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": "quota exceeded"}
    suspending = {"type": "RayClusterSuspending", "status": "False", "reason": "RayClusterSuspending"}
    conditions = {"conditions": [failure, suspending]}
    view = ENGINES["kuberay"].observe(ray_job({"jobDeploymentStatus": "Initializing", "rayClusterStatus": conditions}))
    assert view is not None
    assert view.message == "KubeRay: Initializing; ReplicaFailure: FailedCreateHeadPod: quota exceeded"
    unsent = ENGINES["kuberay"].observe(ray_job({"jobDeploymentStatus": "Running"}))
    assert unsent is not None and unsent.message.endswith("it has not submitted the job to Ray's dashboard yet")
    unseen = ENGINES["kuberay"].observe(ray_job({}))
    assert unseen is not None and unseen.message == "KubeRay has not taken the RayJob up yet"


@pytest.mark.parametrize(("said", "code"), [(2, 2), (-9, 137), (-15, 143)])
def test_a_ray_job_s_exit_code(said: int, code: int) -> None:
    """Ray reports a process that a signal ended by the negative number of the signal."""
    message = f"Job entrypoint command failed with exit code {said}, last available logs (truncated to 20,000 chars): …"
    ended = ENGINES["kuberay"].observe(ray_job({"jobDeploymentStatus": "Failed", "message": message}))
    assert ended is not None and ended.exit_code == code


@pytest.mark.parametrize(("own", "queue"), [("", "gpu"), ("cpu", "cpu")])
@pytest.mark.parametrize("number", [names.PREFLIGHT_RUN, names.CLEANUP_RUN])
def test_preflight_and_clean_up_are_queued_too(number: int, own: str, queue: str) -> None:
    """A cluster that queues every Job would otherwise suspend them forever."""
    queued = body()
    queued["metadata"]["labels"] = {names.QUEUE_LABEL: "gpu", "kueue.x-k8s.io/priority-class": "high"}
    made = plan(queued, (StartRun(number),), replace(SETTINGS, helper_queue=own))
    job = next(item.body for item in made if isinstance(item, Create) and item.run)
    assert job["metadata"]["labels"][names.QUEUE_LABEL] == queue
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"


def test_an_interruption_does_not_fail_the_job() -> None:
    """A Job that Kueue suspends ends its pods with exit code 75 and must continue after its next admission."""
    rules = objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
    codes = [code for rule in rules for code in rule.get("onExitCodes", {}).get("values", [])]
    assert codes == [2, 3, 4]


def test_a_queue_may_admit_an_elastic_job_in_part() -> None:
    elastic = objects(resources={"minNodes": 2, "maxNodes": 5})["Job"]["metadata"]["annotations"]
    assert elastic[names.PARTIAL_ANNOTATION] == "2" and elastic[names.EQUAL_ANNOTATION] == "true"
    assert names.PARTIAL_ANNOTATION not in objects(resources={"nodes": 2})["Job"]["metadata"]["annotations"]


@pytest.mark.parametrize("engine", ["job", "kuberay"])
def test_who_runs_it_elsewhere(engine: str) -> None:
    kinds = {"job": "Job", "kuberay": "RayJob"}
    made = objects(kubernetes={"engine": engine})[kinds[engine]]
    made["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    here = ENGINES[engine].observe(made)
    made["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
    there = ENGINES[engine].observe(made)
    assert here is not None and there is not None
    assert (here.elsewhere, there.elsewhere) == ("", "kueue.x-k8s.io/multikueue")


@pytest.mark.parametrize("engine", ["job", "kuberay"])
def test_the_queue_s_labels_are_on_the_run_alone(engine: str) -> None:
    queued = body(kubernetes={"engine": engine, "preflight": False})
    given = {names.QUEUE_LABEL: "gpu", "kueue.x-k8s.io/priority-class": "high"}
    queued["metadata"]["labels"] = {**given, "team": "a"}
    made = next(item for item in plan(queued, (StartRun(1),), SETTINGS) if isinstance(item, Create) and item.run)
    assert made.body["metadata"]["labels"] == {**names.labels("tiny", 1), **given}
    assert not any(label in json.dumps(made.body["spec"]) for label in given)


def test_a_status_patch_takes_away_what_is_gone() -> None:
    before = {"phase": "Running", "progress": {"step": 1, "loss": 2.0}, "eta": "1m", "attempt": 1}
    patch = patch_status(body(before), {"phase": "Running", "progress": {"step": 2}, "attempt": 1})
    assert patch.status == {"progress": {"step": 2, "loss": None}, "eta": None}


def test_deleting_a_run_names_its_engine_s_object() -> None:
    (operation,) = plan(body(kubernetes={"engine": "kuberay"}), (DeleteRun(2, "kuberay"),), SETTINGS)
    assert operation.path == "/apis/ray.io/v1/namespaces/team/rayjobs/tiny-2"


def test_every_job_runs_with_its_run() -> None:
    assert Run(body(), 1, SETTINGS).name == "tiny-1" and Run(body(), 0, SETTINGS).name == "tiny-preflight"
