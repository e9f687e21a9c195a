"""A table of objects that the CRD's CEL rules accept and reject, for cel-python and for a real API server.

A case contains assignments below the node of a rule; it is tested at every node with the rule (the rules of a data
source, say, at `data` and `evalData` of every stage). A rule without a case, and a case without a rule, are errors.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from support.api.sample_job import DATA, JOB, MORE

from finetune_api.crd import crd
from finetune_api.overrides import apply_overrides

Job = dict[str, Any]
ROOT: Job = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
JUDGE = "{baseUrl: 'http://x/v1', model: y}"
STREAM = "{streaming: true, sources: [{file: x}]}"
OPTIONAL = {
    "evalData": "{sources: [{file: x}]}",
    "expertConfig": "{file: x}",
    "decontaminate": "{sources: [{file: x}]}",
}
"""Values of optional nodes that the sample job lacks, for cases below them."""
SCORED = {
    "data": DATA,
    "metrics": ["rougeL", "executionAccuracy"],
    "database": {"sql": "CREATE TABLE a (b)"},
    "gate": [{"metric": "rougeL", "atLeast": 0.1}],
}
TEACHER = {"endpoint": {"baseUrl": "http://teacher/v1", "model": "m"}}
SYNTHESES: dict[str, Job] = {
    "evolve": {"evolve": {}, "data": DATA, "teacher": TEACHER},
    "questions": {"questions": {}, "data": DATA, "teacher": TEACHER},
    "text2cypher": {"text2cypher": {"database": {"file": "x"}}, "teacher": TEACHER},
    "text2sql": {"text2sql": {"database": {"file": "x"}}, "teacher": TEACHER},
}
"""Values of a stage that synthesizes data, by its method."""
PLAIN = {
    "evaluate": SCORED,
    "synthesize": SYNTHESES["evolve"],
    **{kind: {"data": DATA} | more for kind, more in MORE.items()},
}
"""Values of stages that need more than data."""


@dataclass(frozen=True)
class Case:
    """Assignments below a rule's node (`=value` sets the node itself) that it accepts, and others that it rejects."""

    rule: str
    """A part of the rule's text."""
    accepted: tuple[str, ...]
    refused: tuple[str, ...]
    only: str = ""
    """Suffix of the node's schema path, where the case is not for every node that has the rule."""


CASES = (
    Case("[has(self.hub), has(self.path)", ("={config: {a: 1}}",), ("={config: {a: 1}, path: x}",)),
    Case("[has(self.path), has(self.uri)].filter", ("={uri: 's3://b/x'}",), ("={}",)),
    Case("[has(self.inline), has(self.file)", ("={inline: [{a: 1}]}",), ("={inline: [{a: 1}], uri: 's3://b/x'}",)),
    Case("!has(self.subset)", ("={hub: a/b, subset: c}",), ("={file: x, subset: c}",)),
    Case("!has(self.revision)", ("={hub: a/b, revision: c}",), ("={file: x, revision: c}",)),
    Case("self.validationSplit == 0.0", ("limit=5",), (f"={STREAM}", "limit=5")),
    Case("self.validationSplit == 0.0", ("validationSplit=0.1",), (f"={STREAM}", "validationSplit=0.1"), ".data"),
    Case("!self.data.streaming || has(self.maxSteps)", (f"data={STREAM}", "maxSteps=5"), (f"data={STREAM}",)),
    Case("!has(self.quantization) || has(self.lora)", ("quantization={}", "lora={}"), ("quantization={}", "lora=null")),
    Case("!has(self.lora) || self.lora.merge", ("lora={}",), ("lora={merge: false}",)),
    Case("!self.packing || has(self.maxLength)", ("packing=true", "maxLength=64"), ("packing=true",)),
    Case("!self.scoreOnly", ("scoreOnly=true",), ("scoreOnly=true", "expertConfig={file: x}")),
    Case("!self.data.streaming", ("data.limit=5",), (f"data={STREAM}", "maxSteps=5"), ".rlhf"),
    Case("!self.data.streaming", ("data.limit=5",), (f"data={STREAM}", "maxSteps=5"), ".online"),
    Case("!has(self.maxKl)", ("maxKl=1",), ("maxKl=1", "beta=0")),
    Case(
        "self.perDeviceTrainBatchSize > 1",
        ("lossType=apo_zero_unpaired", "perDeviceTrainBatchSize=1"),
        ("perDeviceTrainBatchSize=1",),
    ),
    Case("has(self.exactMatch)", ("={regex: a}",), ("={regex: a, exactMatch: b}",)),
    Case("has(self.function), has(self.endpoint)]", ("={function: 'a:b'}",), ("={function: 'a:b', model: c}",)),
    Case("!has(self.criteria)", (f"={{endpoint: {JUDGE}, criteria: a}}",), ("={function: 'a:b', criteria: a}",)),
    Case(
        "[has(self.file), has(self.scores), has(self.experts)]",
        ("={experts: {'1': [0]}}",),
        ("={file: x, experts: {'1': [0]}}",),
    ),
    Case("'adapterDisabled' || has(self.lora)", ("reference=model",), ("lora=null",)),
    Case(
        "'precomputed' || !self.data.streaming",
        ("reference=precomputed",),
        ("reference=precomputed", f"data={STREAM}", "maxSteps=5"),
    ),
    Case("'exo_pair' in self", ("lossType=[exo_pair]", "labelSmoothing=0.1"), ("lossType=[exo_pair]",)),
    Case("self.lossWeights.size()", ("lossType=[ipo, sft]", "lossWeights=[1, 0.5]"), ("lossWeights=[1, 0.5]",)),
    Case("[has(self.file), has(self.script)", ("={script: x}",), ("={script: x, file: y}",)),
    Case("has(self.atLeast) ||", ("={metric: rougeL, atMost: 1}",), ("={metric: rougeL}",)),
    Case("self.metrics.size() + self.tasks", ("tasks=[a]",), ("metrics=[]", "database=null", "gate=[]")),
    Case("self.metrics.size() == 0 ||", ("compareWith=[base]",), ("data=null",)),
    Case("!has(self.data) ||", ("seed=1",), (f"data={STREAM}",)),
    Case("'executionAccuracy' in", ("metrics=[rougeL]", "database=null"), ("metrics=[rougeL]",)),
    Case(
        "self.gate.all(g, g.metric",
        ("tasks=[a]", "gate=[{metric: a.acc, atLeast: 1}]"),
        ("tasks=[a]", "gate=[{metric: bleu, atLeast: 1}]"),
    ),
    Case(
        "g.relativeTo in self",
        ("compareWith=[base]", "gate=[{metric: rougeL, atLeast: 1, relativeTo: base}]"),
        ("gate=[{metric: rougeL, atLeast: 1, relativeTo: base}]",),
    ),
    Case("self.doSample || !(has", ("={doSample: true, topK: 3}",), ("={topK: 3}",), ".generation"),
    Case("!self.doSample || self.numBeams", ("={numBeams: 2}",), ("={numBeams: 2, doSample: true}",), ".generation"),
    Case("!has(self.modelCacheClaim) ||", ("modelCacheClaim=a",), ("modelCacheClaim=a", "modelCacheHostPath=/b")),
    Case("!has(self.cacheSizeLimit)", ("cacheSizeLimit=9Gi",), ("cacheSizeLimit=9Gi", "modelCacheClaim=a")),
    Case("self < 0.5", ("=0",), ("=0.5",), ".labelSmoothing"),
    Case("self >= 0.01", ("=0.01",), ("=0",), ".mlmProbability"),
    Case("[has(self.tokenizer), has(self.pretrain)", ("name=a",), ("sft={data: {sources: [{file: x}]}}",)),
    Case("exists_one", ("stages[1].name=a", "stages[2].name=b"), ("stages[1].name=a", "stages[2].name=a")),
    Case(
        "self.stages.all(s, !has(s.tokenizer))",
        ("stages[0].name=a",),
        ("stages[1]={tokenizer: {data: {sources: [{file: x}]}}}",),
    ),
    Case("has(self.model.config)", ("model.config.b=1",), ("model={hub: a/b}",)),
    Case("self.minNodes <= self.maxNodes", ("={minNodes: 1, maxNodes: 2}",), ("={minNodes: 3, maxNodes: 2}",)),
    Case("self.minNodes <= self.maxNodes", ("={minNodes: 2, maxNodes: 2}",), ("={maxNodes: 2}",)),
    Case("!has(self.nodes)", ("={nodes: 2}",), ("={nodes: 2, minNodes: 1, maxNodes: 2}",)),
    Case(
        "!has(self.workersPerNode) || !has(self.gpusPerNode)",
        ("={workersPerNode: 2, gpusPerNode: 0}",),
        ("={workersPerNode: 2, gpusPerNode: 1}",),
    ),
    Case("!self.offloadOptimizer", ("={offloadOptimizer: true}",), ("={offloadOptimizer: true, zero: 0}",)),
    Case("!self.offloadOptimizer", ("={offloadOptimizer: true, zero: 1}",), ("={offloadOptimizer: true, zero: 0}",)),
    Case("!self.offloadParam", ("={offloadParam: true, zero: 3}",), ("={offloadParam: true, zero: 2}",)),
    Case("!self.offloadParam", ("={zero: auto}",), ("={offloadParam: true, zero: auto}",)),
    Case("self.chunkOverlap < self.chunkSize", ("chunkOverlap=199", "chunkSize=200"), ("chunkOverlap=2000",)),
    Case("[has(self.file), has(self.script), has(self.cypher)", ("={cypher: a}",), ("={cypher: a, script: b}",)),
    Case("self.database.engine != 'cypher'", ("database.engine=duckdb",), ("database.engine=cypher",)),
    Case("[has(self.stage), has(self.hub)", ("={path: a}",), ("={path: a, hub: b}",)),
    Case("[has(self.endpoint), has(self.model)]", ("={model: {}}",), ("={}",)),
    Case("[has(self.questions), has(self.evolve)", ("seed=1",), ("questions={}",)),
    Case("has(self.data) == (has(self.questions)", ("seed=1",), ("data=null",), ".synthesize"),
    Case("!has(self.data) || !self.data.streaming", ("seed=1",), (f"data={STREAM}",), ".synthesize"),
    Case("size(self.metadata.name)", ("metadata.name=" + "a" * 40,), ("metadata.name=" + "a" * 41,)),
    Case("self.metadata.name.matches", ("metadata.name=a-1",), ("metadata.name=1-a",)),
)
POLICY = "runPolicy={suspend: true, ttlSecondsAfterFinished: 5, activeDeadlineSeconds: 9, backoffLimit: 0}"
CHANGES = tuple(
    Case(f"self.{field} == oldSelf.{field}", (POLICY,), (change,))
    for field, change in (
        ("model", "model.config.b=1"),
        ("model", "model.config.model_type=gemma"),
        ("stages", "stages[2].sft.seed=1"),
        ("resources", "resources.nodes=2"),
        ("kubernetes", "kubernetes.engine=job"),
        ("sharding", "sharding.offloadOptimizer=true"),
        ("storage", "storage.path=elsewhere"),
    )
)
"""Cases of transition rules: changes to the sample job."""


@dataclass(frozen=True)
class Example:
    """A case at one node: an accepted job, a rejected job, and the message of the rejection."""

    node: str
    """The path of the node in the job, such as `spec.stages[2].sft.data`."""
    rule: str
    message: str
    accepted: Job
    refused: Job

    def __str__(self) -> str:
        return f"{self.node}: {self.message[:40]}"


def rules(schema: Job = ROOT, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield schema path (such as `.spec.stages[].sft.data`), text and message of every rule of the CRD."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield path, rule["rule"], rule["message"]
    for name, inner in schema.get("properties", {}).items():
        yield from rules(inner, f"{path}.{name}")
    if "items" in schema:
        yield from rules(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from rules(schema["additionalProperties"], f"{path}{{}}")


def base_job() -> Job:
    """Return the sample job with a plain stage of each kind that it lacks."""
    job = copy.deepcopy(JOB)
    stages: list[Job] = job["spec"]["stages"]
    present = {kind for stage in stages for kind in stage}
    known = ROOT["properties"]["spec"]["properties"]["stages"]["items"]["properties"]
    lacking = [kind for kind in known if kind not in present | {"name"}]
    stages += [{kind: copy.deepcopy(PLAIN.get(kind, {"data": DATA}))} for kind in lacking]
    return job


def examples(cases: tuple[Case, ...] = CASES) -> list[Example]:
    """Return every case at every node that has its rule."""
    return [
        _example(case, path, rule, message)
        for path, rule, message in rules()
        for case in cases
        if case.rule in rule and path.endswith(case.only)
    ]


def without_case() -> list[str]:
    """Return an error for each rule without a case, and for each case without a rule."""
    everything = list(rules())
    tried = {(path, rule) for path, rule, _ in everything for case in (*CASES, *CHANGES) if _is_for(case, path, rule)}
    missing = [
        f"no case in cel_cases.py for the rule {rule!r} at {path}"
        for path, rule, _ in everything
        if (path, rule) not in tried
    ]
    stale = [case for case in (*CASES, *CHANGES) if not any(_is_for(case, path, rule) for path, rule, _ in everything)]
    return missing + [f"no rule in the CRD for the case {case.rule!r} of cel_cases.py" for case in stale]


def _is_for(case: Case, path: str, rule: str) -> bool:
    return case.rule in rule and path.endswith(case.only)


def _example(case: Case, path: str, rule: str, message: str) -> Example:
    job = base_job()
    node = _node(path, job)
    made = apply_overrides(job, _parents(node), yaml.safe_load)
    accepted, refused = (
        apply_overrides(made, [_below(node, assignment) for assignment in assignments], yaml.safe_load)
        for assignments in (case.accepted, case.refused)
    )
    return Example(node, rule, message, accepted, refused)


def _node(path: str, job: Job) -> str:
    """Return the path in the sample job of the node with this schema path."""
    head, _, rest = path.removeprefix(".").partition("stages[]")
    if not rest:
        return head + ("stages[1]" if "stages[]" in path else "")
    kind = rest.removeprefix(".").partition(".")[0]
    stage = next(index for index, stage in enumerate(job["spec"]["stages"]) if kind in stage)
    return f"{head}stages[{stage}]{rest.replace('[]', '[0]')}"


def _parents(node: str) -> list[str]:
    """Return assignments that create the optional parents of `node`."""
    parts = node.split(".")
    return [*_synthesis(parts), *_optional(parts)]


def _synthesis(parts: list[str]) -> list[str]:
    """Return an assignment of a synthesis stage with the method of a node below it."""
    if "synthesize" not in parts:
        return []
    at = parts.index("synthesize")
    inner = parts[at + 1] if len(parts) > at + 1 else ""
    made = copy.deepcopy(SYNTHESES.get(inner, SYNTHESES["evolve"]))
    made |= {"teacher": {"model": {}}} if parts[-2:] == ["teacher", "model"] else {}
    return [f"{'.'.join(parts[: at + 1])}={json.dumps(made)}"]


def _optional(parts: list[str]) -> list[str]:
    return [f"{'.'.join(parts[: at + 1])}={OPTIONAL[part]}" for at, part in enumerate(parts) if part in OPTIONAL]


def _below(node: str, assignment: str) -> str:
    return assignment if not node else node + assignment if assignment[0] == "=" else f"{node}.{assignment}"
