"""The schema of the chart's values is closed: helm rejects an unknown name or an invalid value at any level."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from support.cluster.helm_chart import CHART, HelmError

Json = dict[str, Any]
Render = Callable[..., list[Json]]
SCHEMA: Json = json.loads((CHART / "values.schema.json").read_text())
VALUES: Json = yaml.safe_load((CHART / "values.yaml").read_text())
OPEN = {"/properties/global", "/$defs/kubernetes"}
"""Schemas that are open: helm adds the values of subcharts to one, and the API server validates the other."""


def objects(node: Any, path: str = "") -> Iterator[tuple[str, Json]]:
    """Yield the schema of each object with its path."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for name, inner in node.items():
            yield from objects(inner, f"{path}/{name}")


def test_the_schema_is_closed_at_every_level() -> None:
    found = dict(objects(SCHEMA))
    assert len(found) > 30
    for path, node in found.items():
        closed = node.get("additionalProperties") is False
        typed = isinstance(node.get("additionalProperties"), dict)
        assert closed or typed or path in OPEN, path
    assert found.keys() >= OPEN


def sections(values: Json, path: str = "") -> Iterator[str]:
    yield path
    for name, inner in values.items():
        if isinstance(inner, dict) and not name.lower().endswith(("labels", "annotations", "selector")):
            yield from sections(inner, f"{path}{name}.")


@pytest.mark.parametrize("section", list(sections(VALUES)))
def test_a_misspelt_name_is_refused_everywhere(rendered: Render, section: str) -> None:
    if section == "resources.requests." or section == "resources.limits.":
        section += "cpu."  # resource names are free, because extended resources are allowed
    with pytest.raises(HelmError, match=r"additional properties 'enabld' not allowed|got object, want"):
        rendered(None, f"--set={section}enabld=true")


@pytest.mark.parametrize(
    "given",
    [
        "image.digest=sha256:12",
        "image.tag=a:b",
        "image.pullPolicy=Sometimes",
        "image.repository=",
        "jobs.engine=ray",
        "jobs.networkPolicy=yes",
        "jobs.backoffSeconds=-1",
        "jobs.backoffSeconds=1.5",
        "jobs.kuberay.rayVersion=2.60",
        "jobs.preflight.memory=4Gb",
        "operator.pollSeconds=0",
        "watchNamespaces={Team_A}",
        "watchNamespaces={a,a}",
        "resources.limits.memory=4GB",
        "tolerations[0].keys=a",
        "affinity.nodeAfinity.x=1",
        "extraEnv[0].name=FINETUNE_IMAGE",
        "extraEnv[0].value=1",
        "imagePullSecrets[0]=name",
        "metrics.port=70000",
        "metrics.serviceMonitor.interval=soon",
        "metrics.serviceMonitor.relabelings[0].source_labels[0]=a",
        "metrics.serviceMonitor.relabelings[0].action=delete",
        "networkPolicy.metricsFrom[0].podSelectr.x=1",
        "podDisruptionBudget.maxUnavailable=-1",
        "podDisruptionBudget.maxUnavailable=half",
        "commonLabels.app\\.kubernetes\\.io/name=x",
        "crds=null",
    ],
)
def test_a_wrong_value_is_refused(rendered: Render, given: str) -> None:
    with pytest.raises(HelmError, match=r"values don't meet the specifications|values\.schema"):
        rendered(None, f"--set={given}")


@pytest.mark.parametrize("given", ["metrics.dashboard.enabled=true", "resources.limits.cpu=2", "jobs.preflight.cpu=2"])
def test_the_same_places_take_right_values(rendered: Render, given: str) -> None:
    assert rendered(None, f"--set={given}")
