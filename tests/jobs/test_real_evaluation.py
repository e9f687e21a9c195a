"""Real data: fine-tuning on text2cypher improves exact match, ROUGE and perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs.running import done, run

DATA = Path(__file__).parents[2].parent / "shared/data"
TABLE = DATA / "text2cypher.csv"
SOURCES = {"sources": [{"file": str(TABLE)}]}
QUESTIONS = SOURCES | {"template": {"prompt": "{question}", "completion": "{cypher}"}, "validationSplit": 0.02}
JOB: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "text2cypher"},
    "spec": {
        "model": {
            "config": {
                "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            }
        },
        "resources": {"workersPerNode": 2},
        "stages": [
            {"tokenizer": {"data": {"sources": [{"file": str(TABLE), "format": "text"}]}, "vocabSize": 4096}},
            {
                "sft": {
                    "data": QUESTIONS, "maxLength": 320, "overflow": "drop", "maxSteps": 500,
                    "perDeviceTrainBatchSize": 8, "learningRate": 2e-3, "loggingSteps": 50,
                }
            },
            {
                "evaluate": {
                    "data": QUESTIONS,
                    "metrics": ["exactMatch", "rouge1", "rouge2", "rougeL", "perplexity"],
                    "compareWith": ["base"],
                    "generation": {"maxNewTokens": 128},
                    "perDeviceEvalBatchSize": 16,
                    "gate": [{"metric": "rougeL", "relativeTo": "base", "atLeast": 0.3}],
                }
            },
        ],
    },
}  # fmt: skip


@pytest.mark.skipif(not TABLE.is_file(), reason=f"the real data is not here: {TABLE}")
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_fine_tuning_shows_in_every_metric(tmp_path: Path) -> None:
    """The metrics are of held-out questions; the untrained model's answers match almost nothing of the references."""
    job = JOB | {"spec": JOB["spec"] | {"storage": {"path": str(tmp_path)}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    code, output = run(tmp_path / "job.yaml", timeout=2400)
    assert code == 0, output
    stage = tmp_path / "text2cypher/stages/02-evaluate"
    metrics = done(stage)["metrics"]
    evaluation = json.loads((stage / "evaluation.json").read_text())
    for name in JOB["spec"]["stages"][2]["evaluate"]["metrics"]:
        before, after = metrics[f"base.{name}"], metrics[name]
        print(f"{name} on {evaluation['rows']} held-out questions: {before:.4f} -> {after:.4f}")
        assert (after < before) if name == "perplexity" else (after > before)
