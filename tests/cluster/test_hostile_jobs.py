"""Hostile jobs, pods and users on a real API server: each is rejected or harmless."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.finetune_jobs import Jobs, condition, driver, job
from support.cluster.helm_chart import Installed
from support.cluster.hostile_reports import HOSTILE_ANSWERS, hostile_port
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess, eventually

from finetune_api.job import GROUP, NAME_MAX, PLURAL, VERSION
from finetune_operator.core.names import JOB_LABEL, MANAGED_BY, OPERATOR, RUN_LABEL

Json = dict[str, Any]
SELECTOR = "finetune.dev/job={},finetune.dev/run={}"
IP, OTHER_IP = "127.0.7.1", "127.0.7.2"
"""Addresses for the pods of this module only."""
SECRET = "hunter2-hunter2-hunter2"


@pytest.fixture(scope="module")
def operator(operator_access: Access, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    with OperatorProcess(operator_access, tmp_path_factory.mktemp("operator")) as running:
        yield running


@pytest.fixture
def jobs(finetune_jobs: client.CustomObjectsApi, namespace: str, operator: OperatorProcess) -> Jobs:
    return Jobs(finetune_jobs, namespace)


def pod_of(kubelet: KubeletStandIn, namespace: str, run: int | str = 1, name: str = "tiny") -> str:
    (pod,) = kubelet.pods(namespace, 1, selector=SELECTOR.format(name, run))
    return pod


def with_template(spec: object = None, **template: Any) -> Json:
    given = template if spec is None else {"spec": spec, **template}
    return job(resources={"podTemplate": given})


def trainer(**fields: Any) -> Json:
    return {"containers": [{"name": "trainer", **fields}]}


REFUSED_TEMPLATES: dict[str, tuple[Json, str]] = {
    "hostNetwork": (with_template({"hostNetwork": True}), "hostNetwork: is not allowed"),
    "nodeName": (with_template({"nodeName": "node-a"}), "nodeName: is not allowed"),
    "account": (with_template({"serviceAccountName": "admin"}), "this operator allows default"),
    "priority": (with_template({"priorityClassName": "system-node-critical"}), "is reserved for Kubernetes' own pods"),
    "ephemeral": (with_template({"ephemeralContainers": [{"name": "x"}]}), "ephemeralContainers: is not allowed"),
    "hostPath": (with_template({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}), "hostPath: is not allowed"),
    "hostPort": (with_template(trainer(ports=[{"containerPort": 1, "hostPort": 1}])), "hostPort: is not allowed"),
    "root": (with_template({"securityContext": {"runAsUser": 0}}), "jobs may not run as root"),
    "as root": (with_template(trainer(securityContext={"runAsNonRoot": False})), "jobs may not run as root"),
    "procMount": (with_template(trainer(securityContext={"procMount": "Unmasked"})), "only Default"),
    "windows": (with_template({"securityContext": {"windowsOptions": {"hostProcess": True}}}), "windowsOptions"),
    "sysctl": (with_template({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}), "no safe"),
    "seccomp": (with_template({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}), "'Unconfined'"),
    "appArmor": (with_template(trainer(securityContext={"appArmorProfile": {"type": "Unconfined"}})), "'Unconfined'"),
    "old appArmor": (
        with_template(metadata={"annotations": {"container.apparmor.security.beta.kubernetes.io/x": "unconfined"}}),
        "is reserved: remove it",
    ),
    "privileged": (with_template(trainer(securityContext={"privileged": True})), "privileged: is not allowed"),
    "capability": (with_template(trainer(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}})), "SYS_ADMIN"),
    "kubelet's hand": (
        with_template(trainer(lifecycle={"preStop": {"httpGet": {"host": "169.254.169.254", "port": 80}}})),
        "requests go to the pod itself only",
    ),
    "label": (with_template(metadata={"labels": {RUN_LABEL: "7"}}), "is reserved: remove it"),
    "job label": (with_template(metadata={"labels": {"batch.kubernetes.io/job-name": "x"}}), "is reserved: remove it"),
    "finalizer": (with_template(metadata={"finalizers": ["a.b/c"]}), "finalizers: is not allowed"),
    "unknown": (with_template({"hostFutureThing": True}), "hostFutureThing: is not allowed"),
    "misplaced": (with_template(sepc={"hostNetwork": True}), "sepc: is not allowed"),
    "types": (with_template({"containers": {"name": "x"}}), "is of type dict, expected list"),
    "more types": (with_template("spec"), "is of type str, expected dict"),
    "many": (with_template({f"x{n}": n for n in range(10000)}), "x0: is not allowed"),
}


@pytest.mark.parametrize("case", REFUSED_TEMPLATES)
def test_a_template_that_reaches_for_more_is_refused(case: str, jobs: Jobs, api: client.ApiClient) -> None:
    body, says = REFUSED_TEMPLATES[case]
    jobs.create(body)
    failed = jobs.until_phase("Failed")
    assert condition(failed, "Failed")["reason"] == "PodTemplateRefused"
    assert says in condition(failed, "Failed")["message"]
    assert client.BatchV1Api(api).list_namespaced_job(jobs.namespace).items == []


@pytest.mark.parametrize(
    "uri",
    ["pvc://../../etc/passwd", "pvc://claim/../../etc", "pvc:///etc", "pvc://Claim:ro/x", "pvc://a b/x", "s3://b/../c",
     "pvc://claim/\x1b[31m", f"pvc://{'a' * 300}/x"],
)  # fmt: skip
def test_a_uri_that_leads_elsewhere_is_refused(uri: str, jobs: Jobs) -> None:
    jobs.create(job(storage={"uri": uri}))
    assert condition(jobs.until_phase("Failed"), "Failed")["reason"] == "InvalidSpec"


def test_names_at_their_limits_and_a_large_config_run(
    jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api
) -> None:
    name = "a" * NAME_MAX
    rows = [
        {"text": f"row {n} \u202e \u0000 \x1b[31m \U0001f600 '\"; $(id) `id` {{{{ x }}}} ../../etc"}
        for n in range(10000)
    ]
    sources = [{"inline": rows[first : first + 1000]} for first in range(0, len(rows), 1000)]
    stage = {"pretrain": {"data": {"sources": sources}, "maxSteps": 1}}
    tokenizer = job()["spec"]["stages"][0]
    jobs.create(job(name, stages=[tokenizer, stage]))
    kubelet.running(jobs.namespace, pod_of(kubelet, jobs.namespace, name=name))
    jobs.until_phase("Running", name)
    (config,) = core.list_namespaced_config_map(jobs.namespace, label_selector=f"{JOB_LABEL}={name}").items
    kept = json.loads(config.data["run.json"])["job"]["spec"]["stages"][1]["pretrain"]["data"]["sources"]
    assert [row["text"] for source in kept for row in source["inline"]] == [row["text"] for row in rows]


def test_a_secret_in_the_environment_is_told_to_nobody(
    jobs: Jobs, kubelet: KubeletStandIn, core: client.CoreV1Api, operator: OperatorProcess
) -> None:
    jobs.create(with_template(trainer(env=[{"name": "A_TOKEN", "value": SECRET}, {"name": "PLAIN", "value": SECRET}])))
    pod = pod_of(kubelet, jobs.namespace)
    kubelet.running(jobs.namespace, pod)
    jobs.until_phase("Running")
    said = json.dumps({"exitCode": 2, "message": f"KeyError: {SECRET} is no key"})
    kubelet.finished(jobs.namespace, pod, 2, message=said)
    failed = jobs.until_phase("Failed")
    assert "KeyError: *** is no key" in failed["status"]["failure"]["message"]
    written = [
        item for item in core.list_namespaced_event(jobs.namespace).items if item.reporting_component == OPERATOR
    ]
    configs = core.list_namespaced_config_map(jobs.namespace).items
    assert written and SECRET not in json.dumps(failed["status"]) + str(written) + str(configs) + operator.log()


def test_credentials_come_from_secrets_alone(jobs: Jobs, core: client.CoreV1Api, operator: OperatorProcess) -> None:
    named = {"name": "AWS_SECRET_ACCESS_KEY", "value": SECRET}
    shaped = {"name": "PROXY", "value": f"https://me:{SECRET}@proxy"}
    path = {"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": "/etc/gcp/key.json"}
    jobs.create(with_template(trainer(env=[named, shaped, path])))
    failed = jobs.until_phase("Failed")
    message = condition(failed, "Failed")["message"]
    assert "env[0].value: AWS_SECRET_ACCESS_KEY is a credential" in message and "env[1].value: PROXY" in message
    assert "GOOGLE" not in message
    told = str(core.list_namespaced_event(jobs.namespace).items)
    assert SECRET not in json.dumps(failed["status"]) + told + operator.log()


@pytest.mark.parametrize("kind", HOSTILE_ANSWERS)
def test_a_hostile_report_changes_nothing(kind: str, jobs: Jobs, kubelet: KubeletStandIn) -> None:
    jobs.create(job())
    pod = pod_of(kubelet, jobs.namespace)
    with hostile_port(kind, IP) as port:
        kubelet.running(jobs.namespace, pod, ip=IP)
        jobs.until_phase("Running")
        eventually(lambda: port.asked >= 2)
        assert port.elsewhere == 0, "a redirect was followed"
        assert "progress" not in jobs.read()["status"]
    kubelet.finished(jobs.namespace, pod)
    jobs.until_phase("Succeeded")


@pytest.mark.parametrize(
    "said",
    [
        "[" * 4000,
        '{"exitCode": 2, "message": "\\ud800"}',
        json.dumps(
            {"stages": [{"name": "x", "state": "Running"}] * 32, "exitCode": 3, "message": "CUDA out of memory"}
        ),
        '{"step": {"step": 1, "total": 1e400}}',
        '{"current": -99999}',
        '{"exitCode": 1, "message": "\\u001b[2J\\u202egnp"}',
        "\x1b]0;owned\x07",
        "{}",
    ],
)
def test_a_hostile_last_word_is_survived(said: str, jobs: Jobs, kubelet: KubeletStandIn) -> None:
    jobs.create(job(runPolicy={"backoffLimit": 0}))
    pod = pod_of(kubelet, jobs.namespace)
    kubelet.running(jobs.namespace, pod)
    jobs.until_phase("Running")
    kubelet.finished(jobs.namespace, pod, 1, message=said)
    status = json.dumps(jobs.until_phase("Failed")["status"], ensure_ascii=False)
    assert not {"\x1b", "\u202e", "\x07"} & set(status)


def test_somebody_else_s_job_and_pod_with_our_labels_count_for_nothing(
    jobs: Jobs, kubelet: KubeletStandIn, api: client.ApiClient, core: client.CoreV1Api
) -> None:
    labels = {MANAGED_BY: OPERATOR, JOB_LABEL: "tiny", RUN_LABEL: "1"}
    container = {"name": "trainer", "image": "x"}
    pod = {
        "metadata": {"name": "fake", "labels": labels},
        "spec": {"containers": [container], "restartPolicy": "Never"},
    }
    core.create_namespaced_pod(jobs.namespace, pod)
    template = {"metadata": {"labels": labels}, "spec": pod["spec"]}
    fake = {"metadata": {"name": "other", "labels": labels | {RUN_LABEL: "99"}}, "spec": {"template": template}}
    client.BatchV1Api(api).create_namespaced_job(jobs.namespace, fake)
    with hostile_port("redirect", OTHER_IP) as port:
        kubelet.running(jobs.namespace, "fake", ip=OTHER_IP)
        made = jobs.create(job())
        own = kubelet.pods(jobs.namespace, 3, selector=SELECTOR.format("tiny", 1))
        mine = next(name for name in own if name.startswith("tiny-1-0"))
        with driver(made["metadata"]["uid"], 1) as running:
            kubelet.running(jobs.namespace, mine)
            kubelet.finished(jobs.namespace, "fake", 2, message='{"exitCode": 2, "message": "a lie"}')
            running.reporter.checkpoint_saved(1, 3, "/pvc/c-3")
            seen = jobs.until(lambda status: "lastCheckpoint" in status and status["phase"] == "Running")
        assert seen["status"]["lastCheckpoint"]["step"] == 3 and seen["status"]["attempt"] == 1
        assert port.asked == 0, "somebody else's pod was given the run's token"


def test_a_run_s_name_that_somebody_else_has_is_waited_for(jobs: Jobs, api: client.ApiClient) -> None:
    batch = client.BatchV1Api(api)
    spec = {"template": {"spec": {"containers": [{"name": "x", "image": "x"}], "restartPolicy": "Never"}}}
    batch.create_namespaced_job(jobs.namespace, {"metadata": {"name": "tiny-1"}, "spec": spec})
    jobs.create(job())
    seen = jobs.until(lambda status: "Forbidden" in str(status.get("conditions")))
    assert "belongs to another owner" in condition(seen, "Running")["message"]


def test_the_template_s_containers_get_no_rights_that_they_do_not_ask_for(jobs: Jobs, api: client.ApiClient) -> None:
    spec = {"containers": [{"name": "side", "image": "x"}], "initContainers": [{"name": "first", "image": "x"}]}
    jobs.create(with_template(spec))
    eventually(lambda: client.BatchV1Api(api).list_namespaced_job(jobs.namespace).items)
    (made,) = client.BatchV1Api(api).list_namespaced_job(jobs.namespace).items
    pod = made.spec.template.spec
    assert pod.automount_service_account_token is False and pod.service_account_name is None
    for container in [*pod.containers, *pod.init_containers]:
        assert container.security_context.allow_privilege_escalation is False
        assert container.security_context.capabilities.drop == ["ALL"]


def test_the_operator_s_own_key_is_not_to_be_had(
    release: Installed, finetune_jobs: client.CustomObjectsApi, operator_access: Access, tmp_path: Path
) -> None:
    own = Jobs(finetune_jobs, release.namespace)
    secret = release.environment["FINETUNE_TOKEN_KEY_SECRET"]
    settings = {"FINETUNE_NAMESPACES": release.namespace, "FINETUNE_OPERATOR_NAMESPACE": release.namespace}
    with OperatorProcess(operator_access, tmp_path, FINETUNE_TOKEN_KEY_SECRET=secret, **settings):
        own.create(job("thief", kubernetes={"preflight": False, "envFromSecrets": [secret]}))
        failed = own.until_phase("Failed", "thief")
    assert "is the operator's own: remove it" in condition(failed, "Failed")["message"]
    own.delete("thief")


def test_a_user_of_one_namespace_gains_nothing_in_another(
    admin: Access, api: client.ApiClient, release: Installed, jobs: Jobs, kubelet: KubeletStandIn
) -> None:
    """The user has the chart's `edit` rules, bound in one namespace."""
    with namespace_of(admin, "other") as other:
        core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
        core.create_namespaced_service_account(jobs.namespace, {"metadata": {"name": "user"}})
        role = {"metadata": {"name": "user"}, "rules": [
            {"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["create", "get", "update", "patch"]}]}  # fmt: skip
        rbac.create_namespaced_role(jobs.namespace, role)
        subject = {"kind": "ServiceAccount", "name": "user", "namespace": jobs.namespace}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "user"}
        rbac.create_namespaced_role_binding(
            jobs.namespace, {"metadata": {"name": "user"}, "roleRef": reference, "subjects": [subject]}
        )
        with admin.service_account(jobs.namespace, "user").client() as own:
            objects = client.CustomObjectsApi(own)
            stolen = job("stolen") | {"status": {"phase": "Succeeded", "attempts": [{"number": 1}]}}
            for body in (job("elsewhere"), job() | {"metadata": {"name": "x", "namespace": other}}):
                with pytest.raises(client.ApiException) as refused:
                    objects.create_namespaced_custom_object(GROUP, VERSION, other, PLURAL, body)
                assert refused.value.status == 403
            made = objects.create_namespaced_custom_object(GROUP, VERSION, jobs.namespace, PLURAL, stolen)
            assert "status" not in made
            with pytest.raises(client.ApiException) as refused:
                objects.patch_namespaced_custom_object_status(
                    GROUP, VERSION, jobs.namespace, PLURAL, "stolen", {"status": {"phase": "Succeeded"}}
                )
            assert refused.value.status == 403
        kubelet.running(jobs.namespace, pod_of(kubelet, jobs.namespace, name="stolen"))
        jobs.until_phase("Running", "stolen")
        batch = client.BatchV1Api(api)
        assert batch.list_namespaced_job(other).items == [] and core.list_namespaced_pod(other).items == []
        assert [item.metadata.name for item in core.list_namespaced_secret(other).items] == []
        (pod,) = core.list_namespaced_pod(jobs.namespace, label_selector=f"{JOB_LABEL}=stolen").items
        assert pod.spec.service_account_name == "default"
        assert not [
            mount
            for item in pod.spec.containers
            for mount in item.volume_mounts
            if "serviceaccount" in mount.mount_path
        ]
