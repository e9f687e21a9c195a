"""Jobs that can't work: each ends with exit code 2 and a clear message, and nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune_cli.main import app

Job = dict[str, Any]


def sft(job: Job) -> Job:
    return job["spec"]["stages"][0]["sft"]


def put(job: Job, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    place: Any = job
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = value


def rows(job: Job, *values: Any) -> None:
    sft(job)["data"]["sources"] = [{"inline": list(values)}]


def dpo(job: Job, **fields: Any) -> None:
    data = {"sources": [{"file": "pairs.jsonl"}]}
    job["spec"]["stages"] = [{"dpo": {"data": data, "maxLength": 64, "maxSteps": 2, **fields}}]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


LONG = {"messages": [turn("user", "1 plus 1"), turn("assistant", "makes 2 " * 80)]}
SAME = {"prompt": "1 plus 1", "chosen": " makes 2", "rejected": " makes 2"}

CASES: dict[str, tuple[Callable[[Job], Any], list[str]]] = {
    "typo in a field": (
        lambda job: put(job, "spec/stages/0/sft/learningrate", 1e-4),
        ["unknown field `learningrate` in stages[0].sft: did you mean `learningRate`?"],
    ),
    "snake case": (lambda job: put(job, "spec/stages/0/sft/max_steps", 3), ["did you mean `maxSteps`?"]),
    "another tool's name": (lambda job: put(job, "spec/stages/0/sft/batch_size", 3), ["perDeviceTrainBatchSize"]),
    "wrong type": (
        lambda job: put(job, "spec/stages/0/sft/learningRate", "fast"),
        ["stages[0].sft.learningRate: got 'fast', expected a number"],
    ),
    "out of range": (lambda job: put(job, "spec/stages/0/sft/maxSteps", 0), ["stages[0].sft.maxSteps: got 0"]),
    "wrong choice": (
        lambda job: put(job, "spec/stages/0/sft/lrSchedulerType", "cosin"),
        ["stages[0].sft.lrSchedulerType", "cosine"],
    ),
    "no stages": (lambda job: put(job, "spec/stages", []), ["stages"]),
    "two kinds in a stage": (
        lambda job: put(job, "spec/stages/0/dpo", sft(job)),
        ["exactly one of tokenizer, pretrain, sft, esft, dpo"],
    ),
    "bad name": (lambda job: put(job, "metadata/name", "My Job"), ["metadata.name"]),
    "wrong version": (lambda job: put(job, "apiVersion", "finetune.dev/v9"), ["finetune.dev/v1alpha1"]),
    "missing file": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "row.jsonl"}]),
        ["stages[0].sft.data.sources[0].file", "row.jsonl", "rows.jsonl"],
    ),
    "empty file": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "empty.jsonl"}]),
        ["stages[0].sft.data.sources[0]", "empty"],
    ),
    "broken json": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "broken.jsonl"}]),
        ["broken.jsonl", "line 2"],
    ),
    "unknown format": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "rows.xyz"}]),
        ["rows.xyz", "format"],
    ),
    "a column that isn't there": (
        lambda job: put(job, "spec/stages/0/sft/data/columns", {"messages": "mesages"}),
        ["mesages", "messages"],
    ),
    "a template's column that isn't there": (
        lambda job: put(job, "spec/stages/0/sft/data/template", {"prompt": "{quest}", "completion": "{messages}"}),
        ["quest"],
    ),
    "join without a match": (
        lambda job: put(
            job, "spec/stages/0/sft/data/sources", [{"file": "q.jsonl", "join": {"file": "t.csv", "key": "id"}}]
        ),
        ["join", "id"],
    ),
    "an example longer than the context": (
        lambda job: (rows(job, LONG), sft(job).pop("maxLength")),
        ["stages[0].sft", "longer than", "64"],
    ),
    "maxLength over the context": (lambda job: put(job, "spec/stages/0/sft/maxLength", 4096), ["4096", "64"]),
    "nothing to learn": (
        lambda job: rows(job, {"messages": [turn("user", "1 plus 1")]}),
        ["stages[0].sft.data", "1 no assistant turn"],
    ),
    "identical pairs": (
        lambda job: (dpo(job), put(job, "spec/stages/0/dpo/data/sources", [{"inline": [SAME, SAME]}])),
        ["stages[0].dpo.data", "chosen", "rejected"],
    ),
    "pairs without a rejected answer": (
        lambda job: (dpo(job), put(job, "spec/stages/0/dpo/data/sources", [{"file": "rows.jsonl"}])),
        ["chosen"],
    ),
    "LoRA on no module": (
        lambda job: put(job, "spec/stages/0/sft/lora", {"targetModules": ["q_prj"]}),
        ["stages[0].sft.lora.targetModules", "q_prj", "q_proj"],
    ),
    "ZeRO-3 with 8-bit": (
        lambda job: (
            put(job, "spec/stages/0/sft/lora", {}),
            put(job, "spec/stages/0/sft/quantization", {"bits": 8}),
            put(job, "spec/sharding", {"zero": 3}),
        ),
        ["sharding.zero", "8-bit"],
    ),
    "quantization without LoRA": (
        lambda job: put(job, "spec/stages/0/sft/quantization", {"bits": 4}),
        ["quantization needs lora"],
    ),
    "offload without ZeRO-3": (
        lambda job: put(job, "spec/sharding", {"offloadParam": True, "zero": 1}),
        ["offloadParam needs zero: 3"],
    ),
    "no such model": (lambda job: put(job, "spec/model", {"path": "/no/such/model"}), ["model.path", "/no/such/model"]),
    "unknown family": (
        lambda job: put(
            job, "spec/model", {"config": {"model_type": "qwen33"}, "tokenizer": job["spec"]["model"]["path"]}
        ),
        ["model.config", "qwen33", "qwen3"],
    ),
    "unknown field of the family": (
        lambda job: put(
            job,
            "spec/model",
            {"config": {"model_type": "qwen3", "hiden_size": 8}, "tokenizer": job["spec"]["model"]["path"]},
        ),
        ["hiden_size", "hidden_size"],
    ),
    "a tokenizer stage for a model that has one": (
        lambda job: put(
            job,
            "spec/stages",
            [{"tokenizer": {"data": {"sources": [{"inline": [{"text": "a"}]}]}}}, *job["spec"]["stages"]],
        ),
        ["tokenizer stage needs model.config"],
    ),
    "more GPUs than there are": (
        lambda job: put(job, "spec/resources", {"gpusPerNode": 64}),
        ["resources.gpusPerNode", "64"],
    ),
    "storage that can't be written": (
        lambda job: put(job, "spec/storage", {"path": "/proc/nowhere"}),
        ["storage.path", "/proc"],
    ),
    "packing without a length": (
        lambda job: (put(job, "spec/stages/0/sft/packing", True), sft(job).pop("maxLength")),
        ["packing needs maxLength"],
    ),
    "streaming without steps": (
        lambda job: (put(job, "spec/stages/0/sft/data/streaming", True), sft(job).pop("maxSteps")),
        ["streaming", "maxSteps"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_job(name: str, base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(LONG) + '\n{"messages": [')
    (tmp_path / "rows.xyz").write_text("?")
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, **LONG}))
    (tmp_path / "t.csv").write_text("id,more\n2,x\n")
    change, expected = CASES[name]
    change(base_job)
    result = CliRunner().invoke(app, ["run", str(write_job(base_job))])
    assert result.exit_code == 2, result.output
    for part in expected:
        assert part in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path / "runs").glob("**/checkpoint-*"))


def test_all_faults_at_once(base_job: Job, write_job: Callable[[Job], Path]) -> None:
    sft(base_job)["learningrate"] = 1e-4
    sft(base_job)["maxSteps"] = "many"
    sft(base_job)["data"]["sources"] = [{"file": "row.jsonl"}]
    base_job["spec"]["sharding"] = {"zero": 7}
    result = CliRunner().invoke(app, ["run", str(write_job(base_job))])
    assert result.exit_code == 2
    for part in ("learningRate", "stages[0].sft.maxSteps", "sharding.zero"):
        assert part in result.output


def test_a_good_job_is_valid(base_job: Job, write_job: Callable[[Job], Path]) -> None:
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 0, result.output
    assert "job: valid (sft)" in result.output
