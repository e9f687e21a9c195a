"""What a preflight pod reports, tested with the command that it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch import drive
from finetune_trainer.launch.cluster_preflight import run_preflight

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
ROWS = [{"text": "to be or not to be, that is the question"}] * 40


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of the pod's termination message."""
    monkeypatch.setattr(drive, "TERMINATION_LOG", tmp_path / "termination-log")
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])  # undo what the command sets
    return tmp_path / "termination-log"


def config(tmp_path: Path, stages: list[dict[str, Any]], root: str = "", **spec: Any) -> Path:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny", "namespace": "team"},
        "spec": {"model": {"config": CONFIG}, "stages": stages, "storage": {"path": str(tmp_path)}, **spec},
    }
    root = root or str(tmp_path / "team" / "tiny")
    run = RunConfig.model_validate({"job": job, "root": root, "baseDir": "/", "cacheDir": str(tmp_path / "cache")})
    file = tmp_path / "run.json"
    file.write_text(run.model_dump_json(by_alias=True, exclude_none=True))
    return file


def test_a_job_that_can_work_tells_its_plan(tmp_path: Path, said: Path) -> None:
    data = {"sources": [{"inline": ROWS}]}
    pretrain = {"data": data, "maxSteps": 7, "blockSize": 32}
    stages = [{"tokenizer": {"data": data, "vocabSize": 300}}, {"pretrain": pretrain}]
    assert run_preflight(config(tmp_path, stages)) == 0
    report = json.loads(said.read_text())
    assert report["plan"]["steps"] == 7 and report["plan"]["parameters"] > 10_000 and report["exitCode"] == 0
    assert not list((tmp_path / "team" / "tiny").iterdir())


def test_every_fault_at_once(tmp_path: Path, said: Path) -> None:
    data = {"sources": [{"file": "/nowhere/x.jsonl"}]}
    stages = [{"tokenizer": {"data": data}}, {"pretrain": {"data": data, "maxSteps": 7, "blockSize": 512}}]
    assert run_preflight(config(tmp_path, stages)) == 2
    message = json.loads(said.read_text())["message"]
    assert "stages[0].tokenizer.data" in message and "stages[1].pretrain" in message


def test_storage_that_cannot_be_written(tmp_path: Path, said: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    data = {"sources": [{"inline": ROWS}]}
    stages = [{"tokenizer": {"data": data}}, {"pretrain": {"data": data, "maxSteps": 7, "blockSize": 32}}]
    assert run_preflight(config(tmp_path, stages, f"{blocker}/team/tiny")) == 2
    assert json.loads(said.read_text())["message"].startswith("storage.path: can't write to")


def test_a_sample_of_the_data_is_tokenised(tmp_path: Path, said: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.chat_template
    long = {"prompt": "a", "completion": "to be or not to be " * 200}
    stages = [{"sft": {"data": {"sources": [{"inline": [long] * 4}]}, "overflow": "error"}}]
    assert run_preflight(config(tmp_path, stages, model={"path": str(tiny_model)})) == 2
    assert "4 of 4 examples are longer than" in json.loads(said.read_text())["message"]


def test_a_secret_in_a_message_is_taken_out(
    tmp_path: Path, said: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nowhere-to-be-seen")
    data = {"sources": [{"file": "/nowhere-to-be-seen/x.jsonl"}]}
    assert run_preflight(config(tmp_path, [{"tokenizer": {"data": data}}])) == 2
    assert "nowhere-to-be-seen" not in said.read_text() + capsys.readouterr().err
    assert "***" in said.read_text()
