"""The `--set` option sets fields of a job, and rejects invalid assignments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import yaml

from finetune_api.overrides import OverrideError, apply_overrides
from finetune_api.validation import check_job


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("stages[2].sft.learningRate=1.0e-4", ("spec", "stages", 2, "sft", "learningRate"), 1e-4),
        ("spec.stages[2].sft.seed=1", ("spec", "stages", 2, "sft", "seed"), 1),
        ("metadata.name=other", ("metadata", "name"), "other"),
        ("metadata.labels[app.io/name]=x", ("metadata", "labels", "app.io/name"), "x"),
        ("resources.nodes=2", ("spec", "resources", "nodes"), 2),
        ("resources={nodes: 2, gpusPerNode: 8}", ("spec", "resources"), {"nodes": 2, "gpusPerNode": 8}),
        ("stages[2].sft.quantization.bits=8", ("spec", "stages", 2, "sft", "quantization", "bits"), 8),
        ("model.config.rope_scaling.factor=2", ("spec", "model", "config", "rope_scaling", "factor"), 2),
        ("stages[2].sft.data.sources[0].file=a=b", ("spec", "stages", 2, "sft", "data", "sources", 0, "file"), "a=b"),
        ("runPolicy.activeDeadlineSeconds=", ("spec", "runPolicy", "activeDeadlineSeconds"), None),
    ],
)
def test_assignments_land_where_they_say(
    job: dict[str, Any], assignment: str, place: tuple[Any, ...], value: object
) -> None:
    before = copy.deepcopy(job)
    result: Any = apply_overrides(job, [assignment], yaml.safe_load)
    assert job == before
    assert check_job(result)[1] == []
    for part in place:
        result = result[part]
    assert result == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("resources.nodes", "--set resources.nodes: expected path=value"),
        ("=1", "the path is empty"),
        ("stages[7].sft.seed=1", "stages[7]: the job has 4 stages"),
        ("stages[4]={}", "stages[4]: the job has 4 stages"),
        ("stages[2].sft.data.sources[1].file=x", "stages[2].sft.data.sources has 1 item"),
        ("stages[2].sft.evalData.sources[0].file=x", "stages[2].sft.evalData.sources: the job has no sources"),
        ("stages.sft=1", "stages is a list: expected an index, such as stages[0]"),
        ("model[0]=1", "model is a mapping: expected a field, got index 0"),
        ("metadata.name.x=1", "metadata.name is 'tiny', not a mapping"),
        ("resorces.nodes=1", "unknown field `resorces` in spec: did you mean `resources`?"),
        ("stages[2]..sft=1", "is not a path such as"),
        ("model.hub=[", "the value is not valid YAML"),
    ],
)
def test_bad_assignments_are_refused(job: dict[str, Any], assignment: str, message: str) -> None:
    with pytest.raises(OverrideError) as caught:
        apply_overrides(job, [assignment], yaml.safe_load)
    assert isinstance(caught.value, ValueError)
    assert message in str(caught.value)


def test_all_bad_assignments_at_once(job: dict[str, Any]) -> None:
    with pytest.raises(OverrideError) as caught:
        apply_overrides(job, ["x", "resources.nodes=1", "stages[9]=1"], yaml.safe_load)
    assert len(caught.value.problems) == 2
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_a_shared_yaml_anchor_changes_in_one_place_only() -> None:
    job = yaml.safe_load("{spec: {stages: [{sft: {data: &d {limit: 1}}}, {dpo: {data: *d}}]}}")
    stages = apply_overrides(job, ["stages[1].dpo.data.limit=2"], yaml.safe_load)["spec"]["stages"]
    assert (stages[0]["sft"]["data"]["limit"], stages[1]["dpo"]["data"]["limit"]) == (1, 2)
