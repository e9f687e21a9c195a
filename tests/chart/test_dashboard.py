"""The dashboard's PromQL queries use series and labels that the operator exports, and show every metric."""

from __future__ import annotations

import json
from typing import Any

import promql_parser as promql
import pytest
from support.cluster.helm_chart import CHART, only

from finetune_operator.core.conditions import Reason
from finetune_operator.metrics import Metrics

Json = dict[str, Any]
DASHBOARD: Json = json.loads((CHART / "files" / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
ATTEMPTS = [{"number": 1, "startTime": "2026-01-01T00:00:10Z", "endTime": "2026-01-01T00:01:00Z", "reason": "Evicted"}]
RUNNING: Json = {"phase": "Running", "startTime": "2026-01-01T00:00:05Z", "attempt": 1,
                 "progress": {"step": 3, "tokensPerSecond": 10.0}}  # fmt: skip


def exported() -> dict[str, set[str]]:
    """Return the series with their labels that an operator exports after an attempt of a job."""
    metrics, key = Metrics(), ("team", "tiny")
    body = {"metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}, "status": {}}
    metrics.seen(key, body, RUNNING)
    metrics.seen(key, body, RUNNING | {"attempts": ATTEMPTS})
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def parsed(query: str) -> promql.Expr:
    """Parse a query after replacing Grafana's variable."""
    return promql.parse(query.replace("$__rate_interval", "5m"))


def selectors(query: str) -> list[promql.VectorSelector]:
    found: list[promql.VectorSelector] = []
    promql.walk(parsed(query), lambda node: found.append(node) if isinstance(node, promql.VectorSelector) else None)
    return found


def grouped(query: str) -> set[str]:
    """Return the labels that a query groups by."""
    found: set[str] = set()

    def look(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            found.update(node.modifier.labels)

    promql.walk(parsed(query), look)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_is_about_what_is_exported(query: str) -> None:
    series = exported()
    for selector in selectors(query):
        assert selector.name in series
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched | grouped(query) <= series[selector.name]


def test_every_metric_is_shown() -> None:
    shown = {selector.name for query in QUERIES for selector in selectors(query)}
    hidden = {name for name in exported() if name not in shown}
    assert all(name.endswith(("_sum", "_count")) for name in hidden), hidden  # panels show a histogram's buckets


def test_reasons_that_are_left_out_are_reasons() -> None:
    values = [m.value for q in QUERIES for s in selectors(q) for m in s.matchers.matchers if m.name == "reason"]
    assert values and {word for value in values for word in value.split("|")} <= {reason.value for reason in Reason}


def test_the_variable_asks_for_a_label_that_is_there() -> None:
    (variable,) = [item for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]
    name, label = variable["query"].removeprefix("label_values(").removesuffix(")").split(", ")
    assert label in exported()[name]


def test_panels_have_places_and_numbers_of_their_own(rendered: Any) -> None:
    values = {"metrics": {"dashboard": {"enabled": True}}}
    installed = json.loads(only(rendered(values), "ConfigMap")["data"]["finetune-operator.json"])
    assert installed == DASHBOARD
    boxes = [panel["gridPos"] for panel in installed["panels"]]
    cells = [(box["x"] + x, box["y"] + y) for box in boxes for x in range(box["w"]) for y in range(box["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in installed["panels"]}) == len(installed["panels"])
