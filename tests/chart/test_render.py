"""The rendered chart matches the operator's settings, metrics, labels, CRD and versions."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cluster.helm_chart import CHART, RELEASE, HelmError, environment, helm, only

from finetune_operator.core import names
from finetune_operator.core.settings import PREFIX, Settings, from_environment
from finetune_operator.engines import ENGINES
from finetune_operator.render.pods import USER

Json = dict[str, Any]
Render = Callable[..., list[Json]]
ROOT = CHART.parents[1]
ALL: Json = {
    "commonLabels": {"team": "ml"},
    "podLabels": {"app.kubernetes.io/name": "another", "tier": "control"},
    "podAnnotations": {"note": "x"},
    "image": {"digest": "sha256:" + "a" * 64},
    "imagePullSecrets": [{"name": "pull"}],
    "watchNamespaces": ["team-a", "team-b"],
    "jobs": {
        "engine": "kuberay",
        "networkPolicy": True,
        "allowHostPath": True,
        "serviceAccounts": ["writer", "reader"],
        "imagePullSeconds": 1_000_000,
        "image": {"repository": "registry.example:5000/trainer", "tag": "v2"},
    },
    "operator": {"pollSeconds": 0.5, "lease": {"durationSeconds": 40, "renewDeadlineSeconds": 30.5}},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "control", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "priorityClassName": "high",
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "metrics": {
        "port": 9999,
        "service": {"labels": {"scrape": "yes"}, "annotations": {"note": "x"}},
        "serviceMonitor": {
            "enabled": True,
            "namespace": "monitoring",
            "labels": {"release": "prometheus"},
            "relabelings": [{"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"}],
            "metricRelabelings": [{"action": "drop", "sourceLabels": ["__name__"], "regex": "python_.*"}],
        },
        "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Training"}},
    },
    "networkPolicy": {"enabled": True, "metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]},
    "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
}


@pytest.fixture
def everything(rendered: Render) -> list[Json]:
    return rendered(ALL)


def test_lint_has_nothing_to_say(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(ALL))
    for options in ([], [f"--values={file}"]):
        said = helm("lint", "--strict", str(CHART), *options, directory=tmp_path)
        assert "0 chart(s) failed" in said and "WARNING" not in said


def test_every_setting_is_set_and_by_default_as_the_operator_has_it(default: list[Json]) -> None:
    given = environment(default, "finetune")
    by_itself = {"token_key", "identity"}  # set by a Secret and by the pod's name
    fields = {field.name for field in dataclasses.fields(Settings)} - by_itself
    assert set(given) == {PREFIX + name.upper() for name in fields}
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    engines = {"default_engine": next(iter(ENGINES)), "engines": tuple(ENGINES)}  # the chart enables every engine
    image = f"finetune-trainer:{version}"
    expected = Settings(image=image, operator_namespace="finetune", ray_version=locked("ray"), **engines)
    assert from_environment(given) == expected


def test_settings_of_all_values(everything: list[Json]) -> None:
    found = from_environment(environment(everything, "finetune"))
    assert (found.image, found.default_engine) == ("registry.example:5000/trainer:v2", "kuberay")
    assert found.namespaces == ("team-a", "team-b") and found.service_accounts == ("writer", "reader")
    assert found.network_policy and found.allow_host_path and found.engines == ("job", "kuberay")
    assert (found.image_pull_seconds, found.poll_seconds, found.metrics_port) == (1_000_000, 0.5, 9999)
    assert (found.lease_duration_seconds, found.lease_renew_deadline_seconds) == (40, 30.5)


def locked(package: str) -> str:
    """Return the version in uv.lock of a package; the images are built from that file."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    return next(str(item["version"]) for item in lock["package"] if item["name"] == package)


def test_versions_are_the_project_s() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == chart["version"] == project["version"]


def test_older_kubernetes_is_refused(rendered: Render) -> None:
    with pytest.raises(HelmError, match=r"incompatible with Kubernetes v1\.30"):
        rendered(None, "--kube-version=v1.30.9")
    assert rendered(None, "--kube-version=v1.31.0-gke.1")


def test_the_operator_meets_the_restricted_standard(default: list[Json]) -> None:
    deployment = only(default, "Deployment")["spec"]
    assert deployment["replicas"] == 1 and deployment["strategy"]["type"] == "RollingUpdate"
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "health"}


def test_the_operator_s_pod_has_the_labels_that_jobs_let_in(everything: list[Json]) -> None:
    labels = only(everything, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == names.OPERATOR
    assert labels["team"] == "ml" and labels["tier"] == "control"
    selected = [only(everything, "Deployment")["spec"]["selector"]["matchLabels"]]
    selected.append(only(everything, "Service")["spec"]["selector"])
    selected.append(only(everything, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    selected.append(only(everything, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    for selector in selected:
        assert selector and selector.items() <= labels.items()


def test_images_by_tag_and_digest(default: list[Json], everything: list[Json]) -> None:
    def image(manifests: list[Json]) -> str:
        return str(only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]["image"])

    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert image(default) == f"finetune-operator:{version}"
    assert image(everything) == "finetune-operator@sha256:" + "a" * 64


def test_service_monitor_as_given(everything: list[Json]) -> None:
    monitor, service = only(everything, "ServiceMonitor"), only(everything, "Service")
    (endpoint,) = monitor["spec"]["endpoints"]
    given = ALL["metrics"]["serviceMonitor"]
    assert endpoint["relabelings"] == given["relabelings"]
    assert endpoint["metricRelabelings"] == given["metricRelabelings"]
    assert monitor["metadata"]["namespace"] == "monitoring" and monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]


def test_what_is_off_is_not_there(default: list[Json], rendered: Render) -> None:
    kinds = {item["kind"] for item in default}
    assert not kinds & {"ServiceMonitor", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap"}
    bare = rendered(
        {
            "crds": {"enabled": False},
            "rbac": {"create": False, "aggregateToDefaultRoles": False},
            "serviceAccount": {"create": False, "name": "theirs"},
            "metrics": {"enabled": False},
        }
    )
    assert [item["kind"] for item in bare] == ["Deployment"]
    assert only(bare, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "theirs"
    assert environment(bare, "x")["FINETUNE_METRICS_PORT"] == "0"


def test_combinations_that_cannot_work_are_refused(rendered: Render) -> None:
    with pytest.raises(HelmError, match=r"jobs.engine is kuberay and jobs.kuberay.enabled is false"):
        rendered({"jobs": {"engine": "kuberay", "kuberay": {"enabled": False}}})
    with pytest.raises(HelmError, match="there is nothing to scrape"):
        rendered({"metrics": {"enabled": False, "serviceMonitor": {"enabled": True}}})


def test_the_definition_is_the_committed_one_and_is_kept(default: list[Json]) -> None:
    found = only(default, "CustomResourceDefinition")
    assert found["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    del found["metadata"]["labels"]
    assert found == yaml.safe_load((ROOT / "crds" / "finetune.dev_finetunejobs.yaml").read_text())


def test_names_stay_in_their_bounds(rendered: Render) -> None:
    manifests = rendered({"nameOverride": "n" * 52}, namespace="a" * 63)
    lengths = {len(item["metadata"]["name"]) for item in manifests}
    assert max(lengths) <= 253 and len(only(manifests, "Service")["metadata"]["name"]) <= 63
    two = (rendered(namespace=namespace) for namespace in ("one", "two"))
    first, second = ({item["metadata"]["name"] for item in found if item["kind"] == "ClusterRole"} for found in two)
    assert first and not first & second


def test_the_readme_has_every_value() -> None:
    command = [sys.executable, str(ROOT / "charts" / "values_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_as_a_dependency_of_another_chart(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    (parent / "charts" / "finetune-operator").symlink_to(CHART)
    dependency = {"name": "finetune-operator", "version": "*", "condition": "finetune-operator.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    options = ["--set=global.registry=x", "--set=finetune-operator.enabled=true"]
    assert "kind: Deployment" in helm("template", RELEASE, str(parent), *options, directory=tmp_path)
    options = ["--set=finetune-operator.enabled=false"]
    assert "kind: Deployment" not in helm("template", RELEASE, str(parent), *options, directory=tmp_path)
