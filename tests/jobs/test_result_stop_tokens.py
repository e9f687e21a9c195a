"""Every result stops by itself in plain transformers, and our commands prompt it in its training format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage, trained
from support.jobs.tiny_rows import dialogue
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from typer.testing import CliRunner

from finetune_cli.main import app
from finetune_trainer.form import read_form
from finetune_trainer.generation.merge import merge
from finetune_trainer.training.stage_result import adapter_note, save_result

Job = dict[str, Any]
QUESTION = "2 plus 2"
CHAT = {"sources": [{"inline": [dialogue(QUESTION, "makes 4")]}]}
TEXT = {"sources": [{"inline": [{"text": f"{a} plus {a} makes {a + a}. "} for a in range(40)]}]}
PAIRS = {"sources": [{"file": "pairs.jsonl"}]}
LORA = {"r": 8}
FORMS = {"pretrain": "text", "sft of plain text": "text", "dpo": "prompt-completion"}
FORMS |= {"sft of plain pairs": "prompt-completion", "sft of a stream": "prompt-completion"}
SCORES = """
def even(prompts, completions, completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""
SHORT: Job = {"maxSteps": 1, "perDeviceTrainBatchSize": 2}
ASKED: Job = {"data": CHAT, "generation": {"maxNewTokens": 4}, "numGenerations": 2}
WORDS = [{"prompt": "Two?", "completion": " zorblat"}, {"prompt": "Ten?", "completion": " q"}]
PLAIN = {"sources": [{"inline": WORDS}]}
STAGES: dict[str, Job] = {
    "pretrain": {"pretrain": {"data": TEXT, "blockSize": 32, **SHORT}},
    "sft": {"sft": {"data": CHAT, **SHORT}},
    "sft of plain text": {"sft": {"data": TEXT, **SHORT}},
    "sft of plain pairs": {"sft": {"data": PLAIN, **SHORT}},
    "sft of a stream": {"sft": {"data": {**PLAIN, "streaming": True}, **SHORT}},
    "sft, merged": {"sft": {"data": CHAT, "lora": LORA, **SHORT}},
    "sft, adapter": {"sft": {"data": CHAT, "lora": LORA | {"merge": False}, **SHORT}},
    "dpo": {"dpo": {"data": PAIRS, "lora": LORA, **SHORT}},
    "rlhf": {"rlhf": {**ASKED, "rewards": [{"function": "scores:even"}], **SHORT}},
    "online": {"online": {**ASKED, "judge": {"function": "scores:even"}, "rounds": 1, "perDeviceTrainBatchSize": 1}},
}


def result_of(stage: Job, job: Job, directory: Path) -> Path:
    """Train a job of one stage and return the directory of its saved result."""
    job["spec"]["stages"] = [stage]
    context = open_stage(job, directory)
    with trained(context) as trainer:
        save_result(trainer, context, directory / "result")
    return directory / "result"


def stops(directory: Path) -> tuple[set[str], str]:
    """Return the stop tokens and the padding token of `generation_config.json`."""
    config, tokenizer = GenerationConfig.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return set(tokenizer.convert_ids_to_tokens(ids)), tokenizer.convert_ids_to_tokens(config.pad_token_id)


@pytest.mark.parametrize("kind", STAGES)
def test_a_result_names_the_tokens_that_end_its_answers(kind: str, base_job: Job, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(SCORES)
    result = result_of(STAGES[kind], base_job, tmp_path)
    assert stops(result) == ({"<|endoftext|>", "<|im_end|>"}, "<|pad|>")
    assert read_form(result) == FORMS.get(kind, "chat")


@pytest.mark.parametrize("form", ["prompt-completion", "chat"])
def test_what_was_trained_is_answered_by_our_commands(form: str, base_job: Job, tmp_path: Path) -> None:
    """The tokenizer has a chat template; the rows decide whether it is used."""
    rows = WORDS if form != "chat" else [dialogue(row["prompt"], row["completion"].strip()) for row in WORDS]
    learn = {"maxSteps": 40, "learningRate": 1e-2, "lrSchedulerType": "constant"}
    result = result_of({"sft": {"data": {"sources": [{"inline": rows}]}, **learn}}, base_job, tmp_path)
    said = CliRunner().invoke(app, ["generate", str(result), "--prompt", "Two?", "--prompt", "Ten?", "--device", "cpu"])
    assert [line.strip() for line in said.stdout.splitlines()] == ["zorblat", "q"]


def test_a_chat_ends_by_itself_in_a_plain_pipeline(base_job: Job, tmp_path: Path) -> None:
    stage = {"sft": {"data": CHAT, "maxSteps": 40, "learningRate": 1e-2, "lrSchedulerType": "constant"}}
    ask = pipeline("text-generation", model=str(result_of(stage, base_job, tmp_path)), device="cpu")
    [said] = ask([{"role": "user", "content": QUESTION}], max_new_tokens=40, do_sample=False)
    assert said["generated_text"][-1] == {"role": "assistant", "content": "makes 4"}


def test_a_merged_adapter_stops_and_an_adapter_says_that_its_base_does_not(
    base_job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    base_job["spec"]["stages"] = [STAGES["sft, adapter"]]
    context = open_stage(base_job, tmp_path)
    result = result_of(STAGES["sft, adapter"], base_job, tmp_path)
    note = adapter_note(context, result)
    assert note is not None and "does not stop at <|im_end|>" in note
    merge(str(result), tmp_path / "merged")
    assert stops(tmp_path / "merged") == ({"<|endoftext|>", "<|im_end|>"}, "<|pad|>")


@pytest.mark.parametrize("merged", [True, False])
def test_trained_experts_stop_too(merged: bool, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    base_job["spec"]["model"] = {"path": str(tmp_path / "experts")}
    stage = {"esft": {"data": CHAT, "merge": merged, "sampleTokens": 64, **SHORT}}
    assert stops(result_of(stage, base_job, tmp_path)) == ({"<|endoftext|>", "<|im_end|>"}, "<|pad|>")
