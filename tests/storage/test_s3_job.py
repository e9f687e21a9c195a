"""A job with its corpus and storage on S3 is killed, resumes, and plain transformers loads its result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs.running import run, start
from support.storage.s3_server import BUCKET, S3Server

from finetune_trainer.layout import MANIFEST
from finetune_trainer.progress.metrics_log import read_metrics

STEPS, SAVE, HIT = 40, 4, 14
TEXTS = [f"{a} plus {b} makes {a + b}, says the teacher." for a in range(10) for b in range(10)]


def job() -> dict[str, Any]:
    corpus = {"sources": [{"uri": f"s3://{BUCKET}/corpus/*.jsonl"}]}
    dialogues = [
        {"messages": [{"role": "user", "content": f"{a} plus {a}"}, {"role": "assistant", "content": f"{2 * a}"}]}
        for a in range(8)
    ]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    common = {"saveSteps": SAVE, "saveTotalLimit": 2, "loggingSteps": 1, "perDeviceTrainBatchSize": 2}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"config": {"model_type": "llama", **shape, **heads}},
            "stages": [
                {"tokenizer": {"data": corpus, "vocabSize": 320}},
                {"pretrain": {"data": corpus, "maxSteps": STEPS, "blockSize": 64, **common}},
                {"sft": {"data": {"sources": [{"inline": dialogues}]}, "maxSteps": 4, "maxLength": 64, **common}},
            ],
            "storage": {"uri": f"s3://{BUCKET}/runs"},
        },
    }


@pytest.mark.timeout(600)
def test_a_job_on_s3_is_killed_and_goes_on(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job resumes on another machine: the cache, with everything that was not in storage, is lost."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    s3.fs.pipe_file(f"{BUCKET}/corpus/a.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS).encode())
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job()))

    driver = start(path)
    assert driver.stdout is not None
    told = (re.search(rf" (\d+)/{STEPS} ", line) for line in driver.stdout)
    seen = next((step for step in told if step and int(step[1]) >= HIT), None)
    driver.kill()
    assert seen is not None, f"step {HIT} never came"
    driver.communicate()
    shutil.rmtree(tmp_path / "cache")
    checkpoints = f"{BUCKET}/runs/tiny/stages/01-pretrain/checkpoints"
    s3.fs.invalidate_cache()
    complete = [path for path in s3.fs.glob(f"{checkpoints}/*/{MANIFEST}")]
    assert complete and not s3.fs.exists(f"{BUCKET}/runs/tiny/stages/01-pretrain/done.json")

    code, output = run(path, "--resume")
    assert code == 0, output
    assert "tokenizer: done before, not run again" in output and "resumes at step" in output
    _check_results(s3, tmp_path)
    s3.fs.invalidate_cache()
    assert sorted(name.split("/")[-2] for name in s3.fs.glob(f"{checkpoints}/*/{MANIFEST}")) == [
        f"checkpoint-{step}" for step in (STEPS - SAVE, STEPS)
    ]


def _check_results(s3: S3Server, tmp_path: Path) -> None:
    """Check that the loss curve of both machines is complete and that the model matches its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages = f"{BUCKET}/runs/tiny/stages"
    rows = read_metrics(s3.fs.cat_file(f"{stages}/01-pretrain/metrics.jsonl").decode())
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    s3.fs.get(f"{stages}/02-sft/result/", f"{tmp_path}/result/", recursive=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "result")
    assert model.config.vocab_size == len(tokenizer)
    logits = model(**tokenizer("2 plus 2", return_tensors="pt")).logits
    assert logits.isfinite().all()
