"""Every CEL rule of the CRD accepts one job and refuses another, and pydantic agrees with it on both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finetune_api.crd import crd
from finetune_api.overrides import apply_overrides
from finetune_api.validation import check_job

celpy = pytest.importorskip("celpy", reason="cel-python is not installed: it evaluates the CRD's rules")

ROOT: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
ENVIRONMENT = celpy.Environment()
STREAM = "{streaming: true, sources: [{file: x}]}"

# What is set to have a rule accept, to have it refuse, and a part of the rule that refuses.
CASES = [
    (["model={config: {a: 1}}"], ["model={config: {a: 1}, path: x}"], "has(self.config)].filter"),
    (["storage={uri: 's3://b/x'}"], ["storage={}"], "[has(self.path), has(self.uri)].filter"),
    (
        ["stages[2].sft.data.sources[0]={inline: [{a: 1}]}"],
        ["stages[2].sft.data.sources[0]={inline: [{a: 1}], uri: 's3://b/x'}"],
        "[has(self.inline), has(self.file)",
    ),
    (
        ["stages[2].sft.data.sources[0]={hub: a/b, subset: c}"],
        ["stages[2].sft.data.sources[0]={file: x, subset: c}"],
        "!has(self.subset)",
    ),
    (
        ["stages[2].sft.data.sources[0]={hub: a/b, revision: c}"],
        ["stages[2].sft.data.sources[0]={file: x, revision: c}"],
        "!has(self.revision)",
    ),
    (
        [f"stages[2].sft.data={STREAM}", "stages[2].sft.maxSteps=5"],
        [f"stages[2].sft.data={STREAM}", "stages[2].sft.maxSteps=5", "stages[2].sft.data.validationSplit=0.1"],
        "self.validationSplit == 0.0",
    ),
    (
        ["stages[2].sft.data.limit=5", "stages[2].sft.data.validationSplit=0.1"],
        [f"stages[2].sft.data={STREAM}", "stages[2].sft.maxSteps=5", "stages[2].sft.data.limit=5"],
        "self.validationSplit == 0.0",
    ),
    (
        [f"stages[1].pretrain.data={STREAM}", "stages[1].pretrain.maxSteps=5"],
        [f"stages[1].pretrain.data={STREAM}"],
        "!self.data.streaming || has(self.maxSteps)",
    ),
    (
        ["stages[2].sft.quantization={}"],
        ["stages[2].sft={data: {sources: [{file: x}]}, quantization: {}}"],
        "quantization",
    ),
    (
        ["stages[2].sft={packing: true, maxLength: 64, data: {sources: [{file: x}]}}"],
        ["stages[2].sft.packing=true"],
        "packing",
    ),
    (["stages[3].dpo.reference=model"], ["stages[3].dpo.lora=null"], "adapterDisabled"),
    (
        ["stages[3].dpo.reference=precomputed"],
        ["stages[3].dpo.reference=precomputed", f"stages[3].dpo.data={STREAM}", "stages[3].dpo.maxSteps=5"],
        "precomputed",
    ),
    (
        ["stages[3].dpo.lossType=[exo_pair]", "stages[3].dpo.labelSmoothing=0.1"],
        ["stages[3].dpo.lossType=[exo_pair]"],
        "exo_pair",
    ),
    (
        ["stages[3].dpo.lossType=[ipo, sft]", "stages[3].dpo.lossWeights=[1, 0.5]"],
        ["stages[3].dpo.lossWeights=[1, 0.5]"],
        "self.lossWeights.size()",
    ),
    (
        ["stages[1].name=a"],
        ["stages[1].sft={data: {sources: [{file: x}]}}"],
        "[has(self.tokenizer), has(self.pretrain)",
    ),
    (["stages[1].name=a", "stages[2].name=b"], ["stages[1].name=a", "stages[2].name=a"], "exists_one"),
    (
        ["stages[0].name=a"],
        ["stages[1]={tokenizer: {data: {sources: [{file: x}]}}}"],
        "self.stages.all(s, !has(s.tokenizer))",
    ),
    (["model.config.b=1"], ["model={hub: a/b}"], "has(self.model.config)"),
    (
        ["resources={minNodes: 1, maxNodes: 2}"],
        ["resources={minNodes: 3, maxNodes: 2}"],
        "self.minNodes <= self.maxNodes",
    ),
    (["resources={minNodes: 2, maxNodes: 2}"], ["resources={maxNodes: 2}"], "self.minNodes <= self.maxNodes"),
    (["resources={nodes: 2}"], ["resources={nodes: 2, minNodes: 1, maxNodes: 2}"], "!has(self.nodes)"),
    (
        ["resources={workersPerNode: 2, gpusPerNode: 0}"],
        ["resources={workersPerNode: 2, gpusPerNode: 1}"],
        "workersPerNode",
    ),
    (["sharding.zero=3"], ["sharding.zero=4"], "type(self) == string ?"),
    (["sharding.zero=auto"], ["sharding.zero=some"], "type(self) == string ?"),
    (["sharding={offloadOptimizer: true}"], ["sharding={offloadOptimizer: true, zero: 0}"], "offloadOptimizer"),
    (
        ["sharding={offloadOptimizer: true, zero: 1}"],
        ["sharding={offloadOptimizer: true, zero: 0}"],
        "offloadOptimizer",
    ),
    (["sharding={offloadParam: true, zero: 3}"], ["sharding={offloadParam: true, zero: 2}"], "offloadParam"),
    (["sharding={zero: auto}"], ["sharding={offloadParam: true, zero: auto}"], "offloadParam"),
    (["metadata.name=" + "a" * 40], ["metadata.name=" + "a" * 41], "size(self.metadata.name)"),
    (["metadata.name=a-1"], ["metadata.name=1-a"], "self.metadata.name.matches"),
]
CHANGES = [
    (["model.config.b=1"], "model"),
    (["stages[2].sft.seed=1"], "stages"),
    (["resources.nodes=2"], "resources"),
    (["kubernetes.engine=job"], "kubernetes"),
    (["sharding.offloadOptimizer=true"], "sharding"),
    (["storage.path=elsewhere"], "storage"),
]


def typed(schema: dict[str, Any], value: Any) -> Any:
    """A value as the API server gives it to CEL: defaults filled in, numbers by the type of their field."""
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
    """Each rule with the values that it is about."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield rule["rule"], value, old
    for name, inner in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            yield from bindings(inner, value[name], old[name] if old is not None and name in old else None)
    for item in value if isinstance(value, list) else []:
        yield from bindings(schema.get("items", {}), item)


def refused(job: dict[str, Any], old: dict[str, Any] | None = None) -> list[str]:
    """The rules that refuse a job, or a change to it. Transition rules run on a change only."""
    before = None if old is None else typed(ROOT, old)
    found = []
    for rule, value, previous in bindings(ROOT, typed(ROOT, job), before):
        if "oldSelf" in rule and previous is None:
            continue
        program = ENVIRONMENT.program(ENVIRONMENT.compile(rule))
        if not program.evaluate({"self": value, "oldSelf": previous}):
            found.append(rule)
    return found


def test_the_plain_job_is_accepted(job: dict[str, Any]) -> None:
    assert refused(job) == []


@pytest.mark.parametrize(("accepted", "rejected", "part"), CASES, ids=lambda value: str(value)[:50])
def test_rule_and_pydantic_agree(job: dict[str, Any], accepted: list[str], rejected: list[str], part: str) -> None:
    good = apply_overrides(job, accepted, yaml.safe_load)
    assert refused(good) == []
    assert check_job(good)[1] == []
    bad = apply_overrides(job, rejected, yaml.safe_load)
    assert any(part in rule for rule in refused(bad)), refused(bad)
    assert check_job(bad)[1]


@pytest.mark.parametrize(("assignments", "field"), CHANGES, ids=lambda value: str(value))
def test_a_change_is_refused_by_the_field_s_own_rule(job: dict[str, Any], assignments: list[str], field: str) -> None:
    changed = apply_overrides(job, assignments, yaml.safe_load)
    assert refused(changed, old=job) == [f"self.{field} == oldSelf.{field}"]
    assert refused(changed) == []


def test_the_run_policy_and_metadata_may_change(job: dict[str, Any]) -> None:
    policy = "{suspend: true, ttlSecondsAfterFinished: 5, activeDeadlineSeconds: 9, backoffLimit: 0}"
    changed = apply_overrides(job, [f"runPolicy={policy}", "metadata.labels.a=b"], yaml.safe_load)
    assert refused(changed, old=job) == []


def test_writing_out_a_default_is_no_change(job: dict[str, Any]) -> None:
    changed = apply_overrides(job, ["sharding={}", "storage={path: runs}", "stages[2].sft.seed=42"], yaml.safe_load)
    assert refused(changed, old=job) == []


def test_every_rule_has_a_case() -> None:
    def rules(schema: dict[str, Any]) -> Iterator[str]:
        yield from (rule["rule"] for rule in schema.get("x-kubernetes-validations", []))
        for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
            yield from rules(inner)

    parts = [part for _, _, part in CASES] + [f"self.{field} == oldSelf.{field}" for _, field in CHANGES]
    assert [rule for rule in set(rules(ROOT)) if not any(part in rule for part in parts)] == []
