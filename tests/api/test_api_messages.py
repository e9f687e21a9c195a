"""Each error in a job has its message, and all are reported at once, in the order of the document."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import yaml
from support.api.sample_job import DATA, MORE

from finetune_api.overrides import apply_overrides
from finetune_api.problems import nearest
from finetune_api.validation import check_job

SFT_FIELDS = "adamBeta1, adamBeta2, adamEpsilon, data, dataloaderNumWorkers, evalData, evalSteps, gradient"

FAULTS = [
    # unknown fields
    (["stages[2].sft.learningrate=1"], ["unknown field `learningrate` in stages[2].sft: did you mean `learningRate`?"]),
    (
        ["stages[2].sft.learning_rate=1"],
        ["unknown field `learning_rate` in stages[2].sft: did you mean `learningRate`?"],
    ),
    (
        ["stages[2].sft.per_device_train_batch_size=4"],
        ["unknown field `per_device_train_batch_size` in stages[2].sft: did you mean `perDeviceTrainBatchSize`?"],
    ),
    (["stages[2].sft.lr=1"], ["unknown field `lr` in stages[2].sft: did you mean `learningRate`?"]),
    (["stages[2].sft.epochs=1"], ["unknown field `epochs` in stages[2].sft: did you mean `numTrainEpochs`?"]),
    (
        ["stages[2].sft.batch_size=4"],
        ["unknown field `batch_size` in stages[2].sft: did you mean `perDeviceTrainBatchSize`?"],
    ),
    (
        ["stages[2].sft.max_seq_length=64"],
        ["unknown field `max_seq_length` in stages[2].sft: did you mean `maxLength`?"],
    ),
    (
        ["stages[1].pretrain.max_seq_length=64"],
        ["unknown field `max_seq_length` in stages[1].pretrain: did you mean `blockSize`?"],
    ),
    (["stages[2].sft.lora.rank=8"], ["unknown field `rank` in stages[2].sft.lora: did you mean `r`?"]),
    (["stages[2].sft.xyzzy=1"], [f"unknown field `xyzzy` in stages[2].sft; expected one of {SFT_FIELDS}"]),
    (["modle=x"], ["unknown field `modle` in spec: did you mean `model`?"]),
    (
        ["xyzzy=x"],
        ["unknown field `xyzzy` in spec; expected one of kubernetes, model, resources, runPolicy"],
    ),
    (["metadata.nmae=x"], ["unknown field `nmae` in metadata: did you mean `name`?"]),
    (
        ["stages[2].sft.data.sources[0].join={file: b.csv, kye: id}"],
        ["unknown field `kye` in stages[2].sft.data.sources[0].join: did you mean `key`?"],
    ),
    # numbers
    (["stages[2].sft.learningRate=fast"], ["stages[2].sft.learningRate: got 'fast', expected a number from 0 to 10"]),
    (["stages[2].sft.learningRate=99"], ["stages[2].sft.learningRate: got 99, expected a number from 0 to 10"]),
    (
        ["stages[2].sft.learningRate=1e-4"],
        [
            "stages[2].sft.learningRate: got '1e-4' (text, not a number: write 1.0e-4, without quotes), "
            "expected a number from 0 to 10"
        ],
    ),
    (["stages[2].sft.learningRate=true"], ["stages[2].sft.learningRate: got true, expected a number from 0 to 10"]),
    (["stages[2].sft.learningRate=.nan"], ["stages[2].sft.learningRate: got nan, expected a number from 0 to 10"]),
    (
        ["stages[1].pretrain.numTrainEpochs=0"],
        ["stages[1].pretrain.numTrainEpochs: got 0, expected a number above 0 and up to 100000"],
    ),
    (["stages[1].pretrain.adamBeta1=1"], ["stages[1].pretrain.adamBeta1: got 1, expected a number from 0 to below 1"]),
    (["stages[2].sft.lora.r=8.5"], ["stages[2].sft.lora.r: got 8.5, expected a whole number from 1 to 4096"]),
    (["resources.nodes=0"], ["resources.nodes: got 0, expected a whole number from 1 to 4096"]),
    (
        ["resources.nodes='2'"],
        ["resources.nodes: got '2' (text, not a number: write 2, without quotes), expected a who"],
    ),
    # text
    (
        ["model.dtype=bf16"],
        ["model.dtype: got 'bf16', expected one of auto, float32, bfloat16, float16: did you mean bfl"],
    ),
    (["stages[1].pretrain.objective=mask"], ["got 'mask', expected one of causal, masked: did you mean masked?"]),
    (["sharding.zero=4"], ["sharding.zero: got 4, expected one of auto, 0, 1, 2, 3"]),
    (
        ["model={hub: a b}", "stages[0]={sft: {data: {sources: [{file: x}]}}}"],
        ["model.hub: got 'a b', expected a Hub id"],
    ),
    (["storage={uri: bucket/x}"], ["storage.uri: got 'bucket/x', expected a URI such as `s3://bucket/path`"]),
    (
        ["resources.cpusPerNode=8"],
        ["resources.cpusPerNode: got 8, expected a quantity such as `8`, `500m` or `64Gi`: put"],
    ),
    (
        ["metadata.name=My_Job"],
        ["metadata.name: got 'My_Job', expected up to 40 lower-case letters, digits and inner da"],
    ),
    (["metadata.labels[app.io/x]=1"], ["metadata.labels[app.io/x]: got 1, expected text: put it in quotes"]),
    (["metadata.labels={3: x}"], ["metadata.labels: got the name 3, expected text: put it in quotes"]),
    (
        ["stages[2].name=" + "x" * 50],
        [f"stages[2].name: got '{'x' * 40}'... (50 characters), expected up to 40 lower-case"],
    ),
    (["runPolicy.suspend='yes'"], ["runPolicy.suspend: got 'yes', expected true or false"]),
    (
        ["runPolicy.stallTimeout=soon"],
        ["runPolicy.stallTimeout: got 'soon', expected `auto`, or a number of seconds (0 or more)"],
    ),
    (
        ["runPolicy.stallTimeout=-1"],
        ["runPolicy.stallTimeout: got -1, expected `auto`, or a number of seconds (0 or more)"],
    ),
    (
        ["runPolicy.onBadLoss=rolback"],
        ["runPolicy.onBadLoss: got 'rolback', expected one of fail, skip, rollback: did you mean rollback?"],
    ),
    # shapes
    (["stages[2].sft={}"], ["stages[2].sft.data: is required: Training data."]),
    (
        ["stages[2].sft.data.sources=[]"],
        ["stages[2].sft.data.sources: got an empty list, expected a list of 1 to 64 items"],
    ),
    (
        ["stages[3].dpo.lossType=" + str(["ipo"] * 9)],
        ["dpo.lossType: got a list of 9 items, expected a list of 1 to 8 it"],
    ),
    (["stages[2].sft.data.sources[0]={inline: [1]}"], ["sources[0].inline[0]: got 1, expected a mapping"]),
    (["resources=null"], ["resources: got nothing, expected a mapping"]),
    (["stages=7"], ["stages: got 7, expected a list of 1 to 32 items"]),
    (["apiVersion=v1"], ["apiVersion: got 'v1', expected finetune.dev/v1alpha1"]),
    (["kind=Job"], ["kind: got 'Job', expected FineTuneJob"]),
    # rules between fields
    (["model.hub=a/b"], ["model: set exactly one of hub, path, uri, config; got hub and config"]),
    (["storage={}"], ["storage: set exactly one of path, uri; none is set"]),
    (["stages[2].sft.packing=true"], ["stages[2].sft: packing needs maxLength: the length of a packed row"]),
    (
        ["stages[2].sft.quantization={}", "stages[2].sft.lora=null", "stages[2].sft.packing=true"],
        ["stages[2].sft: packing needs maxLength", "stages[2].sft: quantization needs lora"],
    ),
    (["stages[1].name=a", "stages[2].name=a"], ["2 stages are named 'a': names of stages must be unique"]),
    (["model={hub: a/b}"], ["a tokenizer stage needs model.config: an existing model"]),
    # a rule between fields is evaluated although other fields are invalid, but not on invalid fields
    (
        ["resources.nodes=x", "stages[2].sft.packing=true", "stages[2].sft.seed=-1"],
        ["stages[2].sft: packing needs", "stages[2].sft.seed: got -1", "resources.nodes: got 'x'"],
    ),
    (["stages[2].sft.quantization={}", "stages[2].sft.lora=5"], ["stages[2].sft.lora: got 5, expected a mapping"]),
    (
        ["stages[2].sft.packing=true", "stages[2].sft.max_length=0"],
        ["unknown field `max_length`", "maxLength: got 0, exp"],
    ),
    (["model={Config: {}}"], ["unknown field `Config` in model: did you mean `config`?"]),
]


def problems(job: dict[str, Any], assignments: list[str]) -> list[str]:
    parsed, found = check_job(apply_overrides(job, assignments, yaml.safe_load))
    assert (parsed is None) == bool(found)
    return [str(problem) for problem in found]


def test_valid_job_has_no_problems(job: dict[str, Any]) -> None:
    assert problems(job, []) == []


@pytest.mark.parametrize(("assignments", "expected"), FAULTS, ids=lambda value: value[0][:60])
def test_each_fault_has_its_message(job: dict[str, Any], assignments: list[str], expected: list[str]) -> None:
    found = problems(job, assignments)
    assert len(found) == len(expected), found
    for message, part in zip(found, expected, strict=True):
        assert part in message


def test_the_example_of_the_issue_verbatim(job: dict[str, Any]) -> None:
    job["spec"]["stages"].pop(0)
    job["spec"]["stages"][1]["sft"]["learningrate"] = 1e-4
    message = "unknown field `learningrate` in stages[1].sft: did you mean `learningRate`?"
    assert [str(problem) for problem in check_job(job)[1]] == [message]


def test_all_faults_at_once_in_the_order_of_the_document(job: dict[str, Any]) -> None:
    assignments = [
        "kind=Job",
        "metadata.name=A",
        "model.dtype=x",
        "stages[1].pretrain.lr=fast",
        "stages[3].dpo.beta=-1",
        "stages[3].dpo.lossWeights=[1, 2]",
        "resources={minNodes: 3, maxNodes: 2, nodes: 1}",
        "sharding={zero: 1, offloadParam: true}",
    ]
    places = [message.split(":")[0] for message in problems(job, assignments)]
    assert places == [
        "kind",
        "metadata.name",
        "model.dtype",
        "unknown field `lr` in stages[1].pretrain",
        "stages[1].pretrain.learningRate",
        "stages[3].dpo",
        "stages[3].dpo.beta",
        "resources",
        "resources",
        "sharding",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "the job is empty"),
        ({}, "the job is empty"),
        ([], "got an empty list, expected a mapping with apiVersion, kind, metadata and spec"),
        ("x", "got 'x', expected a mapping"),
        (3, "got 3, expected a mapping"),
        (datetime.date(2026, 1, 1), "expected a mapping"),
    ],
)
def test_what_is_no_job_at_all(data: object, message: str) -> None:
    parsed, found = check_job(data)
    assert parsed is None
    assert len(found) == 1
    assert message in str(found[0])


def test_every_part_that_is_missing_is_named() -> None:
    found = [str(problem) for problem in check_job({"x": 1})[1]]
    assert found[0].startswith("unknown field `x` in the job; expected one of apiVersion")
    assert [message.split(":")[0] for message in found[1:]] == ["apiVersion", "kind", "metadata", "spec"]
    assert "is required: Kind of the resource. Write FineTuneJob." in found[2]


def test_a_job_read_back_from_a_cluster_is_valid(job: dict[str, Any]) -> None:
    job["metadata"] |= {"uid": "1", "resourceVersion": "2", "managedFields": [], "creationTimestamp": "2026-01-01"}
    job["status"] = {"phase": "Running"}
    assert check_job(job)[1] == []


@pytest.mark.parametrize(
    ("name", "valid", "expected"),
    [
        ("LEARNING_RATE", ["learningRate", "loraAlpha"], "learningRate"),
        ("lora_alpha", ["learningRate", "loraAlpha"], "loraAlpha"),
        ("alpha", ["learningRate", "loraAlpha"], "loraAlpha"),
        ("zzz", ["learningRate"], None),
        ("x" * 100_000, ["learningRate"], None),
        ("x", [], None),
    ],
)
def test_nearest(name: str, valid: list[str], expected: str | None) -> None:
    assert nearest(name, valid) == expected


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["stages[5].rlhf.rewards[0].stage=rewrad"], "'rewrad' is not an earlier stage: did you mean `reward`?"),
        (["stages[5].rlhf.rewards[0].stage=sft"], "stages[5].rlhf.rewards[0].stage: 'sft' is not a reward stage"),
        (["stages[6].online.judge.stage=rlhf"], "stages[6].online.judge.stage: 'rlhf' is not a reward stage"),
        (["stages[5].rlhf.maxKl=3", "stages[5].rlhf.beta=0"], "maxKl needs beta > 0"),
        (["stages[5].rlhf.rewards[0].function=mine"], "an import path such as `package.module:name`"),
        (["stages[5].rlhf.numGenerations=1"], "numGenerations: got 1"),
    ],
)
def test_rewards(assignments: list[str], message: str, job: dict[str, Any]) -> None:
    job["spec"]["stages"] += [{kind: {"data": DATA} | MORE.get(kind, {})} for kind in ("reward", "rlhf", "online")]
    changed = apply_overrides(job, assignments, yaml.safe_load)
    assert message in "\n".join(str(problem) for problem in check_job(changed)[1])
