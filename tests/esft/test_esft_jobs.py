"""Whole `esft` jobs: ZeRO and workers change nothing, a run resumes, results load and merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from finetune_api.stages import TokenizerSpec
from finetune_cli.main import app
from finetune_trainer.generation.load import load
from finetune_trainer.stages.tokenizer.stage import train_tokenizer

Run = Callable[..., Path]
TEXTS = [f"{a} plus {b} makes {a + b}, says the teacher. <|im_start|>" for a in range(10) for b in range(10)]


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Qwen3-MoE with 16 experts per layer and a tokenizer."""
    return _save_model(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe")


def _save_model(directory: Path, family: str, **fields: Any) -> Path:
    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 400})
    tokenizer = train_tokenizer(spec, TEXTS, 64)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=64,
        **fields,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(expert_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs an `esft` job with a number of workers and a ZeRO stage and returns its directory."""
    from support.jobs import running

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [_turn("user", f"{a} plus {a}"), _turn("assistant", f"makes {a + a}")]} for a in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def job(name: str, workers: int, zero: int, fields: dict[str, Any], model: Path | None = None) -> Path:
        esft = {
            "data": {"sources": [{"file": "rows.jsonl"}]},
            "maxLength": 64,
            "maxSteps": 6,
            "learningRate": 1e-4,
            "weightDecay": 0.1,
            "merge": False,
            "saveSteps": 3,
            "perDeviceTrainBatchSize": 8 // workers,
        }
        spec = {
            "model": {"path": str(model or expert_model)},
            "stages": [{"esft": esft | fields}],
            "resources": {"workersPerNode": workers},
            "sharding": {"zero": zero},
            "storage": {"path": str(tmp_path / "runs")},
        }
        head = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(head | {"spec": spec}))
        again = (tmp_path / "runs" / name).exists()
        code, output = running.run(path, *(["--resume"] if again else []))
        assert code == 0, output
        return tmp_path / "runs" / name / "stages" / "00-esft"

    return job


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _weights(stage: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(stage / "result" / "expert_adapter.safetensors"))


def _same(one: Path, other: Path) -> None:
    assert (one / "expert_config.json").read_text() == (other / "expert_config.json").read_text()
    mine, theirs = _weights(one), _weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():  # AdamW amplifies rounding errors up to the learning rate, here 1e-4
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_sharding_workers_and_checkpointing_change_nothing(run: Run) -> None:
    from support.jobs.running import losses

    one = run("one", 1, 0, {})
    for name, zero, checkpointing in (("zero-2", 2, True), ("zero-3", 3, False)):
        other = run(name, 2, zero, {"gradientCheckpointing": checkpointing})
        assert losses(other) == pytest.approx(losses(one), abs=1e-5)
        _same(one, other)
        scores = [json.loads((stage / "expert_scores.json").read_text()) for stage in (one, other)]
        assert scores[0]["token_scores"] == scores[1]["token_scores"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_resumes_merges_and_answers(run: Run, tmp_path: Path, expert_model: Path) -> None:
    stage = run("one", 1, 0, {})
    whole = tmp_path / "whole"
    shutil.copytree(stage, whole)
    for name in ("checkpoints/checkpoint-6", "result"):
        shutil.rmtree(stage / name)
    (stage / "done.json").unlink()
    run("one", 1, 0, {})
    _same(stage, whole)
    trained = json.loads((stage / "expert_config.json").read_text())["experts"]
    ids = {str(expert) for layer in trained.values() for expert in layer}
    assert {name.split(".")[5] for name in _weights(stage)} == ids
    assert (stage / "expert_load.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, ["merge", str(stage), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == merged.config.vocab_size
    adapted, base = load(str(stage), "cpu").model, AutoModelForCausalLM.from_pretrained(expert_model)
    differs = set()
    for (name, weight), mine, old in zip(
        merged.named_parameters(), adapted.parameters(), base.parameters(), strict=True
    ):
        assert torch.equal(weight, mine)
        differs |= {name} if not torch.equal(weight, old) else set()
    assert differs and all(".experts." in name for name in differs)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("switch", "kinds"),
    [
        ("trainSharedExperts", {"experts", "shared_expert"}),
        ("trainNonExperts", {"experts", "attention", "router", "embeddings", "norm"}),
    ],
)
def test_switches_train_more_than_routed_experts(run: Run, tmp_path: Path, switch: str, kinds: set[str]) -> None:
    model = _save_model(tmp_path / "model", "qwen2_moe", shared_expert_intermediate_size=32)
    stage = run("one", 1, 0, {switch: True}, model)
    base, trained = load_file(model / "model.safetensors"), _weights(stage)
    changed = {name for name, weight in trained.items() if not torch.equal(weight, base[name])}
    assert {_kind(name) for name in trained} >= kinds and {_kind(name) for name in changed} >= kinds
    assert ("shared_expert" in {_kind(name) for name in trained}) == (switch == "trainSharedExperts")


def _kind(name: str) -> str:
    parts = {".experts.": "experts", ".shared_expert": "shared_expert", ".self_attn.": "attention", ".gate.": "router"}
    found = next((kind for part, kind in parts.items() if part in name), None)
    return found or ("embeddings" if "embed" in name or "lm_head" in name else "norm")
