"""The chart is installed, used and uninstalled on a real API server; its RBAC rules match the operator's requests."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from support.cluster.access import Access, namespace_of, until
from support.cluster.control_plane import ControlPlane
from support.cluster.finetune_jobs import Jobs, job
from support.cluster.helm_chart import CHART, RELEASE, Installed, installed, only, render
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import OperatorProcess

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_operator.core.settings import Settings
from finetune_operator.decide.actions import DeleteJob, DeleteRun, Event, HoldJob, MarkCheckpoint, StartRun
from finetune_operator.engines import ENGINES
from finetune_operator.plan import Create, Delete, Operation, event, patch_status, plan

Json = dict[str, Any]
Right = tuple[str, str, str]
"""API group, resource (with its subresource) and verb."""
WATCHED = {(GROUP, PLURAL), ("", "pods"), *((engine.group, engine.plural) for engine in ENGINES.values())}


def rights(rules: list[Json]) -> set[Right]:
    """Return each right that RBAC rules grant."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed(operation: Operation) -> Right:
    """Return the right that an operation needs, from its path."""
    parts = operation.path.removeprefix("/apis/").removeprefix("/api/").split("/")
    group = parts[0] if operation.path.startswith("/apis/") else ""
    resource = "/".join(part for i, part in enumerate(parts[parts.index("namespaces") + 2 :]) if i != 1)
    verb = "create" if isinstance(operation, Create) else "delete" if isinstance(operation, Delete) else "patch"
    return group, resource, verb


def all_operations(settings: Settings) -> Iterator[Operation]:
    """Return all write operations of the operator, for both engines."""
    for engine in ENGINES:
        body = job(kubernetes={"engine": engine})
        body["metadata"] |= {"namespace": "a", "uid": "00000000-0000-0000-0000-000000000000", "resourceVersion": "1"}
        mark = MarkCheckpoint(1, engine, {"finetune.dev/checkpoint-step": "1"}, True, ("p",))
        actions = (StartRun(0), StartRun(1), mark, DeleteRun(1, engine), HoldJob(True), DeleteJob())
        yield from plan(body, actions, settings)
        yield patch_status(body, {"phase": "Running"})
        yield event(body, Event("Normal", "Training", "x"), datetime.now(UTC))


def watching() -> set[Right]:
    """Return the rights to list and watch the kinds that kopf watches, and to read runs by name."""
    seen = {(group, resource, verb) for group, resource in WATCHED for verb in ("list", "watch")}
    events = ("", "events", "list")  # of a run that does not start
    queue = ("kueue.x-k8s.io", "workloads", "list")  # of a run that a queue holds
    return seen | {events, queue} | {(group, resource, "get") for group, resource in WATCHED if resource != "pods"}


@pytest.mark.parametrize("walls", [False, True])
def test_the_rules_are_what_the_operator_asks_for_and_no_more(tmp_path: Path, walls: bool) -> None:
    manifests = render(tmp_path, {"jobs": {"networkPolicy": walls}})
    role = only(manifests, "ClusterRole", "finetune-finetune-operator")
    settings = Settings(token_key=b"k", network_policy=walls, ray_version="2.60.0")
    assert rights(role["rules"]) == {needed(operation) for operation in all_operations(settings)} | watching()


def test_without_kuberay_there_is_no_right_to_rayjobs(tmp_path: Path) -> None:
    manifests = render(tmp_path, {"jobs": {"kuberay": {"enabled": False}}})
    role = only(manifests, "ClusterRole", "finetune-finetune-operator")
    assert {group for group, _, _ in rights(role["rules"])} == {"", "batch", "kueue.x-k8s.io", GROUP}


def may(access: Access, namespace: str, verb: str, *what: str) -> bool:
    """Whether the API server authorizes a request."""
    return access.kubectl("auth", "can-i", verb, *what, f"--namespace={namespace}", check=False).stdout == "yes\n"


def test_what_the_operator_may_not_do(operator_access: Access, release: Installed, namespace: str) -> None:
    for verb in ("create", "update"):
        assert not may(operator_access, namespace, verb, "finetunejobs.finetune.dev")
    key = release.environment["FINETUNE_TOKEN_KEY_SECRET"]
    assert may(operator_access, release.namespace, "get", f"secrets/{key}")
    assert not may(operator_access, release.namespace, "get", "secrets/another")
    for verb in ("get", "list", "watch"):
        assert not may(operator_access, namespace, verb, "secrets")
    assert not may(operator_access, namespace, "create", "pods")
    assert not may(operator_access, namespace, "get", "pods/log")
    assert not may(operator_access, namespace, "create", "rolebindings.rbac.authorization.k8s.io")


def test_the_operator_runs_as_the_chart_sets_it_up(
    release: Installed, finetune_jobs: client.CustomObjectsApi, kubelet: KubeletStandIn, namespace: str, tmp_path: Path
) -> None:
    """The operator uses the chart's environment and token key, and watches all namespaces."""
    with OperatorProcess(release.access, tmp_path, own_key=True, **release.environment):
        jobs = Jobs(finetune_jobs, namespace)
        jobs.create(job())
        (pod,) = kubelet.pods(namespace, 1, selector="finetune.dev/job=tiny")
        kubelet.running(namespace, pod)
        kubelet.finished(namespace, pod)
        jobs.until_phase("Succeeded")
    secret = release.environment["FINETUNE_TOKEN_KEY_SECRET"]
    with release.admin.client() as api:
        assert client.CoreV1Api(api).read_namespaced_secret(secret, release.namespace).immutable


@pytest.mark.parametrize(("role", "writes"), [("view", False), ("edit", True), ("admin", True)])
def test_default_roles_cover_finetunejobs(
    release: Installed, admin: Access, api: client.ApiClient, namespace: str, role: str, writes: bool
) -> None:
    user = f"user-{role}"
    admin.kubectl("create", "serviceaccount", user, f"--namespace={namespace}")
    bind = ["create", "rolebinding", user, f"--clusterrole={role}", f"--serviceaccount={namespace}:{user}"]
    admin.kubectl(*bind, f"--namespace={namespace}")
    until(
        client.RbacAuthorizationV1Api(api).list_cluster_role,
        lambda found: any(GROUP in (rule.api_groups or []) for rule in found.rules or []),
        field_selector=f"metadata.name={role}",
    )
    access = admin.service_account(namespace, user)
    for verb in ("get", "list", "watch"):
        assert may(access, namespace, verb, "finetunejobs.finetune.dev")
    for verb in ("create", "patch", "delete"):
        assert may(access, namespace, verb, "finetunejobs.finetune.dev") == writes
    assert not may(access, namespace, "patch", "finetunejobs.finetune.dev", "--subresource=status")


def test_an_operator_of_one_namespace(
    admin: Access, finetune_jobs: client.CustomObjectsApi, kubelet: KubeletStandIn, namespace: str, tmp_path: Path
) -> None:
    values: Json = {
        "watchNamespaces": [namespace],
        "crds": {"enabled": False},
        "rbac": {"aggregateToDefaultRoles": False},
    }
    with installed(admin, tmp_path / "helm", values) as release, namespace_of(admin, "other") as other:
        assert {item["kind"] for item in release.manifests}.isdisjoint({"ClusterRole", "ClusterRoleBinding"})
        for access_to, allowed in ((namespace, True), (other, False)):
            assert may(release.access, access_to, "create", "jobs.batch") == allowed
            assert may(release.access, access_to, "list", "finetunejobs.finetune.dev") == allowed
        settings = {"FINETUNE_NAMESPACES": release.environment["FINETUNE_NAMESPACES"]}
        with OperatorProcess(release.access, tmp_path / "operator", **settings):
            Jobs(finetune_jobs, other).create(job("left-alone"))
            Jobs(finetune_jobs, namespace).create(job())
            Jobs(finetune_jobs, namespace).until(lambda status: status.get("attempt") == 1)
        assert "status" not in Jobs(finetune_jobs, other).read("left-alone")


def test_every_manifest_is_taken(
    admin: Access, finetune_jobs: client.CustomObjectsApi, namespace: str, tmp_path: Path
) -> None:
    """Everything optional is enabled, except kinds of the Prometheus operator; unknown fields are errors."""
    values = {
        "watchNamespaces": [namespace],
        "networkPolicy": {"enabled": True},
        "podDisruptionBudget": {"enabled": True},
        "metrics": {"dashboard": {"enabled": True}},
        "jobs": {"networkPolicy": True},
    }
    manifests = render(tmp_path, values, namespace=namespace)
    kinds = {item["kind"] for item in manifests}
    assert kinds >= {"NetworkPolicy", "PodDisruptionBudget", "ConfigMap", "Service", "Role", "Deployment"}
    text = yaml.safe_dump_all(manifests)
    options = ["--server-side", "--dry-run=server", "--validate=strict", "--force-conflicts"]
    admin.kubectl("apply", *options, "--filename=-", stdin=text)


def test_the_pod_is_let_into_a_restricted_namespace(admin: Access, release: Installed) -> None:
    pod = only(release.manifests, "Deployment")["spec"]["template"]
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator", **pod["metadata"]}, "spec": pod["spec"]}
    body["spec"]["serviceAccountName"] = "default"
    with namespace_of(admin, "restricted", {"pod-security.kubernetes.io/enforce": "restricted"}) as namespace:
        admin.apply(body, namespace=namespace)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, control_plane: ControlPlane) -> Iterator[Access]:
    """Start a cluster without the FineTuneJob CRD."""
    with ControlPlane(tmp_path_factory.mktemp("fresh")) as made:
        yield made.admin


def test_uninstalling_keeps_the_definition_and_the_jobs(fresh: Access, tmp_path: Path) -> None:
    with fresh.client() as api, namespace_of(fresh, "work") as namespace:
        custom, extensions = client.CustomObjectsApi(api), client.ApiextensionsV1Api(api)
        with installed(fresh, tmp_path / "helm") as release:
            notes = release.helm("get", "notes", RELEASE)
            assert "KubeRay is not installed. It is not needed" in notes
            definition = extensions.read_custom_resource_definition(f"{PLURAL}.{GROUP}")
            assert definition.metadata.annotations["helm.sh/resource-policy"] == "keep"
            sample = yaml.safe_load(notes.partition("<<'YAML'\n")[2].partition("  YAML\n")[0])
            sample["metadata"]["namespace"] = namespace
            fresh.kubectl("wait", "--for=condition=Established", f"crd/{PLURAL}.{GROUP}", "--timeout=30s")
            custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, sample)
            release.helm("upgrade", RELEASE, str(CHART), "--set=jobs.networkPolicy=true")
            release.helm("uninstall", RELEASE)
            assert release.helm("list", "--short") == ""
        kept = custom.get_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, sample["metadata"]["name"])
        assert kept["spec"]["stages"] and "deletionTimestamp" not in kept["metadata"]
        with installed(fresh, tmp_path / "again", None, "--take-ownership") as release:
            assert release.helm("list", "--short").strip() == RELEASE


def test_the_notes_see_kuberay(fresh: Access, tmp_path: Path) -> None:
    names = {"plural": "rayjobs", "singular": "rayjob", "kind": "RayJob", "listKind": "RayJobList"}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    fresh.apply(
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "rayjobs.ray.io"},
            "spec": {"group": "ray.io", "names": names, "scope": "Namespaced", "versions": [version]},
        }
    )
    fresh.kubectl("wait", "--for=condition=Established", "crd/rayjobs.ray.io", "--timeout=30s")
    with installed(fresh, tmp_path / "helm", None, "--take-ownership") as release:
        assert "KubeRay is installed" in release.helm("get", "notes", RELEASE)
