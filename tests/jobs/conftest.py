"""Fixtures for tests of whole jobs: a tiny saved model and a job that trains it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.jobs.tiny_rows import TEXTS, dialogue

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen3 of about 100,000 parameters with a tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from finetune_api.stages import TokenizerSpec
    from finetune_trainer.stages.tokenizer.stage import train_tokenizer

    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 400})
    tokenizer = train_tokenizer(spec, TEXTS, 64)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    directory = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Use a cache directory for the tests only."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_CACHE"] = str(directory)
    return directory


@pytest.fixture
def base_job(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Return a valid SFT job on twelve dialogues."""
    rows = [dialogue(f"{a} plus {a}", f"makes {a + a}") for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [{"prompt": f"{a} plus 1", "chosen": f" makes {a + 1}", "rejected": f" makes {a + 3}"} for a in range(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"path": str(tiny_model)},
            "stages": [{"sft": {"data": {"sources": [{"file": "rows.jsonl"}]}, "maxLength": 64, "maxSteps": 2}}],
            "storage": {"path": str(tmp_path / "runs")},
        },
    }


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Return a function that writes a job as YAML next to its data."""

    def write(job: dict[str, Any]) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(copy.deepcopy(job)))
        return path

    return write
