"""`finetune merge`, `generate` and `chat` with an expert adapter, outside a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.esft.expert_models import VOCAB, batch, build, train
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from finetune_api.stages import TokenizerSpec
from finetune_cli.main import app
from finetune_trainer.esft.adapter import trained_tensors, write_adapter
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.trainable import prepare
from finetune_trainer.stages.tokenizer.stage import train_tokenizer

TEXTS = [f"{a} plus {b} makes {a + b}." for a in range(10) for b in range(10)]
TRAINED = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter with the trained experts of one layer, its base model and a tokenizer."""
    directory = tmp_path_factory.mktemp("use")
    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 400})
    tokenizer = train_tokenizer(spec, TEXTS, 64)
    model = build("qwen3_moe", vocab_size=max(VOCAB, len(tokenizer)))
    model.save_pretrained(directory / "base")
    config = ExpertConfig({1: (5, 2)})
    prepare(model, config)
    train(model, batch(), steps=3)
    tensors = trained_tensors(model, config, torch.float32, keep=True)
    write_adapter(directory / "adapter", tensors, config, str(directory / "base"))
    tokenizer.save_pretrained(directory / "adapter")
    return directory / "adapter"


def finetune(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_merge_writes_a_model_that_differs_in_the_trained_experts_alone(adapter: Path, tmp_path: Path) -> None:
    finetune("merge", adapter, tmp_path / "merged")
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").named_parameters())
    base = dict(AutoModelForCausalLM.from_pretrained(adapter.parent / "base").named_parameters())
    changed = {
        name: {row for row in range(len(weight)) if not torch.equal(weight[row], base[name][row])}
        for name, weight in merged.items()
        if not torch.equal(weight, base[name])
    }
    assert changed == {name: {2, 5} for name in TRAINED}


def test_an_adapter_answers_as_its_merged_model_does(adapter: Path, tmp_path: Path) -> None:
    finetune("merge", adapter, tmp_path / "merged")
    asked = ("--prompt", "2 plus 3", "--max-new-tokens", 8, "--device", "cpu")
    answers = [
        json.loads(finetune("generate", place, *asked, "--raw", "--json")) for place in (adapter, tmp_path / "merged")
    ]
    assert answers[0] == answers[1] and answers[0]["answer"]
    assert finetune("chat", adapter, *asked) == finetune("chat", tmp_path / "merged", *asked)
