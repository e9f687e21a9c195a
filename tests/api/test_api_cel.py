"""Each CEL rule of the CRD accepts one job and rejects another, and pydantic gives the same result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from support.api.cel_cases import CHANGES, POLICY, ROOT, Example, base_job, examples, without_case

from finetune_api.overrides import apply_overrides
from finetune_api.validation import check_job

celpy = pytest.importorskip("celpy", reason="cel-python is not installed: it evaluates the CRD's rules")

ENVIRONMENT = celpy.Environment()


@cache
def program(rule: str) -> Any:
    return ENVIRONMENT.program(ENVIRONMENT.compile(rule))


def typed(schema: dict[str, Any], value: Any) -> Any:
    """Convert a value as the API server does for CEL: with defaults, and numbers of the field's type."""
    if isinstance(value, list):
        return celpy.celtypes.ListType([typed(schema.get("items", {}), item) for item in value])
    if isinstance(value, dict):
        known = schema.get("properties", {})
        given = {name: inner["default"] for name, inner in known.items() if "default" in inner}
        given |= {name: item for name, item in value.items() if item is not None}
        return celpy.celtypes.MapType(
            {celpy.celtypes.StringType(k): typed(known.get(k, {}), v) for k, v in given.items()}
        )
    return celpy.celtypes.DoubleType(value) if schema.get("type") == "number" else celpy.json_to_cel(value)


def bindings(schema: dict[str, Any], value: Any, old: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield each CEL rule with the value it validates and the old value."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield rule["rule"], value, old
    for name, inner in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            yield from bindings(inner, value[name], old[name] if old is not None and name in old else None)
    for item in value if isinstance(value, list) else []:
        yield from bindings(schema.get("items", {}), item)


def refused(job: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    """Return the rules that reject a job or an update of it. Transition rules run on updates only."""
    before = None if old is None else typed(ROOT, old)
    found = []
    for rule, value, previous in bindings(ROOT, typed(ROOT, job), before):
        if "oldSelf" in rule and previous is None:
            continue
        if not program(rule).evaluate({"self": value, "oldSelf": previous}):
            found.append(rule)
    return found


def test_the_plain_job_is_accepted(job: dict[str, Any]) -> None:
    assert refused(job) == []


@pytest.mark.parametrize("example", examples(), ids=str)
def test_rule_and_pydantic_agree(example: Example) -> None:
    assert refused(example.accepted) == []
    assert check_job(example.accepted)[1] == []
    assert example.rule in refused(example.refused)
    assert check_job(example.refused)[1]


@pytest.mark.parametrize("example", examples(CHANGES), ids=str)
def test_a_change_is_refused_by_the_field_s_own_rule(example: Example) -> None:
    assert refused(example.refused, old=base_job()) == [example.rule]
    assert refused(example.refused) == []


def test_the_run_policy_and_metadata_may_change(job: dict[str, Any]) -> None:
    changed = apply_overrides(job, [POLICY, "metadata.labels.a=b"], yaml.safe_load)
    assert refused(changed, old=job) == []


def test_writing_out_a_default_is_no_change(job: dict[str, Any]) -> None:
    changed = apply_overrides(job, ["sharding={}", "storage={path: runs}", "stages[2].sft.seed=42"], yaml.safe_load)
    assert refused(changed, old=job) == []


def test_every_rule_has_a_case() -> None:
    assert without_case() == []
