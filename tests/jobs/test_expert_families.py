"""Models of every mixture-of-experts family train with SFT and DPO, and generate for prompts of unequal length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.esft.expert_models import FAMILIES, build
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import TEXTS, dialogue
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.stages import TokenizerSpec
from finetune_trainer.launch.stage_run import _prompts
from finetune_trainer.stages.tokenizer.stage import train_tokenizer
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.samples import SamplesCallback
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
QUESTIONS = ["1 plus 1", "what makes 2 plus 2, teacher", "3"]


@pytest.fixture
def family_model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a tiny model of the parametrised family, which outputs router logits, as TRL leaves the configuration."""
    spec = TokenizerSpec.model_validate({"data": {"sources": [{"inline": [{"text": "x"}]}]}, "vocabSize": 320})
    tokenizer = train_tokenizer(spec, TEXTS, 64)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = build(request.param, vocab_size=len(tokenizer), **ids)
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def stage(kind: str, **fields: Any) -> Job:
    rows = [dialogue(question, f"makes {at}" * (at + 1)) for at, question in enumerate(QUESTIONS)]
    pairs = [row | {"chosen": row["messages"], "rejected": dialogue(question, "no")["messages"]}
             for row, question in zip(rows, QUESTIONS, strict=True)]  # fmt: skip
    for pair in pairs:
        del pair["messages"]
    data = {"sources": [{"inline": rows if kind == "sft" else pairs}]}
    common = {"data": data, "evalData": data, "maxLength": 64, "maxSteps": 2, "learningRate": 1e-3}
    return {kind: {**common, **fields}}


@pytest.mark.parametrize("family_model", FAMILIES, indirect=True)
@pytest.mark.parametrize(("kind", "fields"), [("sft", {}), ("dpo", {"lora": {"r": 2, "targetModules": ["o_proj"]}})])
def test_trains_and_answers(kind: str, fields: Job, family_model: Path, base_job: Job, tmp_path: Path) -> None:
    base_job["spec"] |= {"model": {"path": str(family_model)}, "stages": [stage(kind, **fields)]}
    context = open_stage(base_job, tmp_path)
    storage, prompts = Storage(context.run.root), _prompts(context)
    samples = SamplesCallback(context, storage, prompts, Collectives())
    with trained(context, callbacks=[samples]) as trainer:
        samples.after(trainer.model)
        logged = [row for row in trainer.state.log_history if "loss" in row]
        balance = trainer.aux_loss_enabled, trainer.router_aux_loss_coef
        save_result(trainer, context, tmp_path / "result")
    answers = json.loads(storage.read_text(context.layout.samples))
    assert {len(answers[when]) for when in ("before", "after")} == {len(QUESTIONS)}
    lengths = {len(context.tokenizer(prompt["messages"][0]["content"])["input_ids"]) for prompt in prompts}
    assert len(lengths) == len(QUESTIONS)
    assert all((row.get("aux_loss", 0.0) > 0) is balance[0] for row in logged)
    if kind == "sft":
        _generates_in_a_padded_batch(tmp_path / "result")


def _generates_in_a_padded_batch(directory: Path) -> None:
    """Generate with plain transformers."""
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    batch = tokenizer(QUESTIONS, padding=True, padding_side="left", return_tensors="pt")
    batch.pop("token_type_ids", None)
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3
