"""Real data end to end with examples/real_data.yaml; texts of the dialogues are never printed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs.running import done, run
from transformers import AutoModelForSequenceClassification

from finetune_trainer.progress.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
FILES = ("tinyshakespeare.txt", "text2cypher.csv", "text2cypher_schemas.csv", "hh-harmless-test.jsonl.gz")
MISSING = [name for name in FILES if not (DATA / name).is_file()]

MODEL = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@pytest.mark.skipif(bool(MISSING), reason=f"the real data is not here: {DATA} lacks {', '.join(MISSING)}")
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_three_stages_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On held-out data the loss of every stage falls, and DPO ranks more than 0.55 of the pairs correctly."""
    monkeypatch.chdir(ROOT)
    code, output = run(Path("examples/real_data.yaml"), "--set", f"storage.path={tmp_path}", timeout=1800)
    assert code == 0, output
    pretrain, sft, dpo = (tmp_path / "real-data/stages" / name for name in ("01-pretrain", "02-sft", "03-dpo"))
    for stage in (pretrain, sft, dpo):
        facts = done(stage)
        assert (facts["zero"], facts["world_size"]) == (2, 2)
        before, after = _held_out(stage)
        print(f"{stage.name}: held-out loss {before['eval_loss']:.4f} -> {after['eval_loss']:.4f}")
        assert after["eval_loss"] < before["eval_loss"]
        assert (stage / "result/model.safetensors").is_file()
    accuracy, pairs = done(dpo)["metrics"]["eval_rewards/accuracies"], json.loads((dpo / "data.json").read_text())
    print(f"reward accuracy on {pairs['eval_rows']} held-out pairs: {accuracy:.3f}")
    assert accuracy > 0.55


def _held_out(stage: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the held-out metrics before the first step and at the end."""
    rows = read_metrics((stage / "metrics.jsonl").read_text())
    measured = [row for row in rows if "eval_loss" in (row.get("metrics") or {})]
    assert measured[0]["step"] == 0 and measured[-1]["step"] == measured[-1]["total"]
    return measured[0]["metrics"], measured[-1]["metrics"]


@pytest.mark.skipif(bool(MISSING), reason=f"the real data is not here: {DATA} lacks {', '.join(MISSING)}")
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_reward_model(tmp_path: Path) -> None:
    """A reward model trained from scratch in the job ranks more than 0.55 of the held-out hh-harmless pairs correctly.

    Nothing of a held-out pair is in any stage's training data.
    """
    rows = gzip.decompress((DATA / "hh-harmless-test.jsonl.gz").read_bytes()).splitlines(keepends=True)
    seen, held_out = tmp_path / "seen.jsonl", tmp_path / "held-out.jsonl"
    seen.write_bytes(b"".join(row for number, row in enumerate(rows) if number % 5))
    held_out.write_bytes(b"".join(rows[::5]))
    texts = {"sources": [{"file": str(seen)}], "columns": {"text": "chosen"}}
    batch = {"perDeviceTrainBatchSize": 8, "loggingSteps": 10, "warmupRatio": 0.1}
    pairs, other = ({"sources": [{"file": str(file)}], "transcript": {}} for file in (seen, held_out))
    stages: list[dict[str, Any]] = [
        {"tokenizer": {"data": texts, "vocabSize": 4096}},
        {"pretrain": {"data": texts, "blockSize": 128, "maxSteps": 250, "learningRate": 3e-3, **batch}},
        {"reward": {"data": pairs, "evalData": other, "maxSteps": 200, "learningRate": 3e-4, **batch}},
    ]
    stages[-1]["reward"] |= {"maxLength": 256, "overflow": "drop"}
    spec = {"model": {"config": MODEL}, "stages": stages, "storage": {"path": str(tmp_path)}}
    head = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "hh"}}
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(head | {"spec": spec}))
    code, output = run(job, timeout=1800)
    assert code == 0, output
    stage = tmp_path / "hh/stages/02-reward"
    metrics, data = done(stage)["metrics"], json.loads((stage / "data.json").read_text())
    before = _held_out(stage)[0]["eval_accuracy"]
    print(f"accuracy on {data['eval_rows']} held-out pairs: {before:.3f} -> {metrics['eval_accuracy']:.3f}")
    assert data["eval_rows"] > 300 and metrics["eval_accuracy"] > 0.55
    result = AutoModelForSequenceClassification.from_pretrained(stage / "result")
    assert result.config.num_labels == 1
