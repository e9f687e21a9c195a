"""Invalid jobs end with exit code 2 and a clear message before anything is trained."""

from __future__ import annotations

import gzip
import json
import shutil
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
CHATS = {
    "chosen": [turn("user", "1 plus 1"), turn("assistant", "2")],
    "rejected": [turn("user", "1 plus 1"), turn("assistant", "3")],
}

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
    "a weight between 0 and 1": (
        lambda job: rows(job, {"messages": [turn("user", "1 plus 1"), {**turn("assistant", "2"), "weight": 0.3}]}),
        ["stages[0].sft.data.sources[0]: row 0: messages[1].weight is 0.3, expected 0 or 1"],
    ),
    "a picture": (
        lambda job: rows(job, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
        ["stages[0].sft.data.sources[0]: row 0: messages[0].content[0] is a part of type `image_url`"],
    ),
    "a prompt that the chats contradict": (
        lambda job: (
            dpo(job),
            put(job, "spec/stages/0/dpo/data/sources", [{"inline": [{**CHATS, "prompt": "3 plus 3"}]}]),
        ),
        ["stages[0].dpo.data.sources[0]: row 0: `prompt` asks '3 plus 3'", "'1 plus 1'"],
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
    "8-bit DoRA on a CPU": (
        lambda job: (
            put(job, "spec/stages/0/sft/lora", {"useDora": True}),
            put(job, "spec/stages/0/sft/quantization", {"bits": 8}),
        ),
        ["stages[0].sft.lora.useDora", "8-bit", "needs a GPU"],
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
    "binary rows": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "binary.jsonl"}]),
        ["binary.jsonl, line 1: not UTF-8 text"],
    ),
    "an archive that was cut off": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "cut.jsonl.gz"}]),
        ["stages[0].sft.data.sources[0]", "cut.jsonl.gz", "ended before"],
    ),
    "parquet that is none": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "rows.parquet"}]),
        ["rows.parquet: not a readable parquet file"],
    ),
    "another separator than commas": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "semicolons.csv"}]),
        ["semicolons.csv, line 1", "expected commas between columns, not ';'"],
    ),
    "a column twice": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "twice.csv"}]),
        ["twice.csv, line 1: the column `prompt` appears more than once"],
    ),
    "rows nested without end": (
        lambda job: put(job, "spec/stages/0/sft/data/sources", [{"file": "deep.jsonl"}]),
        ["deep.jsonl, line 1: malformed JSON"],
    ),
    "a number where text is expected": (
        lambda job: rows(job, {"prompt": 1, "completion": 2}),
        ["`prompt` is a number, expected a string or a list of messages"],
    ),
    "a role misspelt": (
        lambda job: rows(job, {"messages": [turn("usr", "1 plus 1"), turn("assistant", "makes 2")]}),
        ["messages[0].role is 'usr': did you mean `user`?"],
    ),
    "a role of another tool": (
        lambda job: rows(job, {"messages": [turn("human", "1 plus 1"), turn("gpt", "makes 2")]}),
        ["messages[0].role is 'human': did you mean `user`?"],
    ),
    "no tokenizer": (lambda job: put(job, "spec/model", {"path": "no-tokenizer"}), ["model: no tokenizer at"]),
    "no weights": (lambda job: put(job, "spec/model", {"path": "no-weights"}), ["model.safetensors does not exist"]),
    "pickled weights": (
        lambda job: put(job, "spec/model", {"path": "pickled"}),
        ["model.path", "pytorch_model.bin is not loaded: save the weights as safetensors"],
    ),
    "weights that were cut off": (
        lambda job: put(job, "spec/model", {"path": "cut-weights"}),
        ["model.path", "model.safetensors is damaged or truncated"],
    ),
    "heads that don't divide": (
        lambda job: put(
            job,
            "spec/model",
            {
                "config": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 3},
                "tokenizer": job["spec"]["model"]["path"],
            },
        ),
        ["model.config.num_key_value_heads: 4 attention heads can't share 3"],
    ),
    "a wrong type in the family's field": (
        lambda job: put(
            job,
            "spec/model",
            {"config": {"model_type": "qwen3", "hidden_size": "big"}, "tokenizer": job["spec"]["model"]["path"]},
        ),
        ["model.config: ", "'hidden_size' expected int, got str"],
    ),
    "a store that nobody knows": (
        lambda job: put(job, "spec/storage", {"uri": "ftp2://host/runs"}),
        ["ftp2://host/runs", "Protocol not known"],
    ),
    "a model in a store that nobody knows": (
        lambda job: put(job, "spec/model", {"uri": "ftp2://host/model"}),
        ["ftp2://host/model", "Protocol not known"],
    ),
    "streaming without steps": (
        lambda job: (put(job, "spec/stages/0/sft/data/streaming", True), sft(job).pop("maxSteps")),
        ["streaming", "maxSteps"],
    ),
}


def spoil_data(directory: Path) -> None:
    """Write files whose content does not match their names."""
    (directory / "binary.jsonl").write_bytes(bytes(range(128, 256)))
    (directory / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(LONG).encode() * 99)[:-20])
    (directory / "rows.parquet").write_text("prompt,completion")
    (directory / "semicolons.csv").write_text("prompt;completion\n1 plus 1;makes 2\n")
    (directory / "twice.csv").write_text("prompt,prompt,completion\n1,plus 1,makes 2\n")
    (directory / "deep.jsonl").write_text("[" * 100_000)


def spoil_models(directory: Path, model: Path) -> None:
    """Write copies of a model with missing or damaged files."""
    for name in ("no-tokenizer", "no-weights", "pickled", "cut-weights"):
        shutil.copytree(model, directory / name)
    for path in (directory / "no-tokenizer").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    (directory / "no-weights/model.safetensors").unlink()
    (directory / "pickled/model.safetensors").rename(directory / "pickled/pytorch_model.bin")
    cut = directory / "cut-weights/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])


@pytest.mark.parametrize("name", CASES)
def test_bad_job(name: str, base_job: Job, write_job: Callable[[Job], Path], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text(json.dumps(LONG) + '\n{"messages": [')
    (tmp_path / "rows.xyz").write_text("?")
    spoil_data(tmp_path)
    spoil_models(tmp_path, Path(base_job["spec"]["model"]["path"]))
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


def test_how_rows_are_read_is_told(base_job: Job, write_job: Callable[[Job], Path]) -> None:
    rows(base_job, {"instruction": "1 plus 1", "input": "", "output": "makes 2"})
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 0, result.output
    told = "stages[0].sft.data.sources[0]: reads Alpaca rows from columns `instruction`, `input` and `output`\n"
    assert told in result.output


CALLS = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}


@pytest.mark.parametrize(
    ("field", "row", "expected"),
    [
        (
            "data",
            {"messages": [{"role": "user", "content": "1 and 1"}, CALLS]},
            "sft.data: row 0: the chat template does",
        ),
        (
            "evalData",
            {"prompt": "a", "completion": "b " * 99},
            "sft.maxLength: 1 of 1 examples are longer than 64 tokens",
        ),
    ],
)
def test_validate_reads_the_first_rows(
    field: str, row: Job, expected: str, base_job: Job, write_job: Callable[[Job], Path]
) -> None:
    """`validate` tokenises the first rows, which finds errors that the raw rows do not show."""
    sft(base_job)[field] = {"sources": [{"inline": [row]}]}
    sft(base_job)["overflow"] = "error"
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 2, result.output
    assert expected in " ".join(result.output.split())
