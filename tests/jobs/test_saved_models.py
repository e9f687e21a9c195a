"""Jobs on saved models with problems that users have.

The models have names left by wrappers, missing weights, quantized weights, more tokens than embedding rows, generation
configurations that cannot be saved, or custom code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs.in_process import losses, open_stage, trained
from support.model.saved_models import WEIGHTS, changed, configure, make_model, save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)
from typer.testing import CliRunner

from finetune_cli.main import app
from finetune_trainer.evaluation.compared_models import contenders, open_model
from finetune_trainer.evaluation.likelihood import likelihoods
from finetune_trainer.evaluation.rows import eval_rows
from finetune_trainer.generation.load import load
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.stage_result import save_result

Job = dict[str, Any]
Write = Callable[[Job], Path]
NEW = ["<new1>", "<new2>"]
GENERATION = "generation_config.json"
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
PAIRS = {"sources": [{"file": "pairs.jsonl"}]}
PROMPTS = {"sources": [{"inline": [{"prompt": "1 plus 1"}, {"prompt": "2 plus 2"}]}]}


def more_tokens(model: Path, target: Path) -> Path:
    """Save the model with a tokenizer of two more tokens than its embedding has rows."""
    shutil.copytree(model, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.save_pretrained(target)
    return target


def without_norm(model: Path, target: Path) -> Path:
    return changed(model, target, lambda all: {name: all[name] for name in all if name != "model.norm.weight"})


def compiled(model: Path, target: Path) -> Path:
    return changed(model, target, lambda all: {f"_orig_mod.{name}": one for name, one in all.items()})


def with_code(model: Path, target: Path) -> Path:
    """Save a model with a custom architecture, whose code writes a file if it runs."""
    shutil.copytree(model, target)
    (target / "mine.py").write_text(f"open({str(target / 'ran')!r}, 'w').close()\n")
    return configure(target, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})


def quantized(model: Path, target: Path) -> Path:
    """Save the model quantized by bitsandbytes."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    Qwen3ForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def reward_model(model: Path, target: Path) -> Path:
    Qwen3ForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def without_score(model: Path, target: Path) -> Path:
    whole = reward_model(model, target.with_name("whole"))
    return changed(whole, target, lambda all: {name: all[name] for name in all if "score" not in name})


def stage_of(kind: str, **fields: Any) -> list[Job]:
    return [{kind: fields}]


def rlhf(model: Path) -> list[Job]:
    return stage_of("rlhf", data=PROMPTS, rewards=[{"model": str(model)}], maxSteps=1)


def taught_by(model: Path) -> list[Job]:
    texts = {"sources": [{"inline": [{"text": "a text about sums"}]}]}
    teacher = {"model": {"path": str(model)}}
    return stage_of("synthesize", data=texts, teacher=teacher, questions={})


EVALUATED = {"data": PAIRS, "metrics": ["perplexity"], "quantization": {"bits": 4}}

REFUSED: dict[str, tuple[Callable[[Path, Path], Path], Job, Any, list[str]]] = {
    "a weight is lost": (without_norm, {}, None, ["model.path: the checkpoint lacks 1 weight (model.norm.weight)"]),
    "weights are quantized": (
        quantized,
        {},
        None,
        ["model.path: its weights are quantized (bitsandbytes 4-bit)", "model.dequantize: true"],
    ),
    "they are quantized by gptq": (
        lambda model, target: configure(shutil.copytree(model, target), quantization_config={"quant_method": "gptq"}),
        {"dequantize": True},
        None,
        ["model.path: transformers can't dequantize its gptq weights", "name the model that it was quantized from"],
    ),
    "they are quantized twice": (
        quantized,
        {},
        lambda _: stage_of("evaluate", **{**EVALUATED, "data": {"sources": [{"file": "rows.jsonl"}]}}),
        ["stages[0].evaluate.quantization: the model's weights are quantized already (bitsandbytes 4-bit)"],
    ),
    "more tokens than rows": (
        more_tokens,
        {},
        None,
        ["model.resizeEmbeddings: ", "'<new1>'", "set model.resizeEmbeddings: auto"],
    ),
    "code of its own": (with_code, {}, None, ["auto_map: AutoConfig: mine.C", "never run", "convert it to"]),
    "a generation configuration that none can save": (
        lambda model, target: configure(shutil.copytree(model, target), GENERATION, cache_implementation="magic"),
        {},
        None,
        ["model.path: its generation_config.json is invalid", "magic"],
    ),
    "a teacher that lacks a weight": (
        without_norm,
        {},
        taught_by,
        ["stages[0].synthesize.teacher.model.path: the checkpoint lacks 1 weight (model.norm.weight)"],
    ),
    "a reward model that lacks its score": (
        without_score,
        {},
        rlhf,
        ["stages[0].rlhf.rewards[0].model: the checkpoint lacks 1 weight (score.weight)"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validate_finds(case: str, base_job: Job, write_job: Write, tiny_model: Path, tmp_path: Path) -> None:
    make, fields, stages, expected = REFUSED[case]
    directory = make(tiny_model, tmp_path / "model")
    another = stages in (taught_by, rlhf)  # the job's own model is valid
    base_job["spec"]["model"] = {"path": str(tiny_model if another else directory), **fields}
    if stages is not None:
        base_job["spec"]["stages"] = stages(directory)
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))], input="y\n" * 9)
    assert result.exit_code == 2, result.output
    for part in expected:
        assert part in result.output
    assert not (directory / "ran").exists(), "custom code ran"


TOLD: dict[str, tuple[Callable[[Path, Path], Path], Job, str]] = {
    "names are mapped": (compiled, {}, "model: the checkpoint's names contain `_orig_mod.`"),
    "sampling is repaired": (
        lambda model, target: configure(shutil.copytree(model, target), GENERATION, temperature=0.9, top_p=0.6),
        {},
        "model: generation_config.json: do_sample is set to true",
    ),
    "weights are dequantized": (
        quantized,
        {"dequantize": True},
        "model: its weights are quantized (bitsandbytes 4-bit): a dequantized copy is used",
    ),
    "rows are added": (more_tokens, {"resizeEmbeddings": "auto"}, "model: the embeddings get "),
    "native beside its code": (
        lambda model, target: configure(shutil.copytree(model, target), auto_map={"AutoModelForCausalLM": "mine.M"}),
        {},
        "model: its custom code (auto_map) is not run: transformers' qwen3 is used",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_validate_tells_what_will_be_changed(
    case: str, base_job: Job, write_job: Write, tiny_model: Path, tmp_path: Path
) -> None:
    make, fields, note = TOLD[case]
    base_job["spec"]["model"] = {"path": str(make(tiny_model, tmp_path / "model")), **fields}
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 0 and note in result.output, result.output


def test_an_adapter_of_experts_can_not_keep_added_rows(base_job: Job, write_job: Write, tmp_path: Path) -> None:
    directory = more_tokens(save(make_model("qwen3_moe"), tmp_path / "moe"), tmp_path / "more")
    base_job["spec"]["model"] = {"path": str(directory), "resizeEmbeddings": "auto"}
    data = {"sources": [{"inline": [{"prompt": "1 plus 1", "completion": "makes 2"}]}]}
    base_job["spec"]["stages"] = stage_of("esft", data=data, merge=False, maxLength=64, maxSteps=1)
    result = CliRunner().invoke(app, ["validate", str(write_job(base_job))])
    assert result.exit_code == 2 and "stages[0].esft.merge: the result would lack" in result.output, result.output


def sft(job: Job, model: Path, model_fields: Job, **fields: Any) -> Job:
    job["spec"]["model"] = {"path": str(model), **model_fields}
    job["spec"]["stages"][0]["sft"] |= fields
    return job


def trained_result(job: Job, tmp_path: Path) -> Path:
    """Return the result of the job's first stage."""
    context = open_stage(job, tmp_path)
    with trained(context) as trainer:
        save_result(trainer, context, tmp_path / "result")
    return tmp_path / "result"


def test_wrapped_names_train_alike_and_are_saved_plainly(base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    expected = losses(base_job, tmp_path)
    sft(base_job, compiled(tiny_model, tmp_path / "compiled"), {})
    assert losses(base_job, tmp_path) == expected
    assert load_file(trained_result(base_job, tmp_path) / WEIGHTS).keys() == load_file(tiny_model / WEIGHTS).keys()


def test_a_reference_is_read_with_the_same_names(base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    """TRL loads the reference by the policy's name; without the fix, wrapped names would give it random weights."""
    base_job["spec"]["model"] = {"path": str(compiled(tiny_model, tmp_path / "compiled"))}
    rewards = [{"regex": "[aeiou]"}]
    for algorithm in ("rloo", "grpo"):
        base_job["spec"]["stages"] = stage_of(
            "rlhf", data=PROMPTS, rewards=rewards, algorithm=algorithm, maxSteps=1, numGenerations=2,
            generation={"maxNewTokens": 4}, perDeviceTrainBatchSize=2,
        )  # fmt: skip
        with trained(open_stage(base_job, tmp_path)) as trainer:
            kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
        assert kl and abs(kl[0]) < 1e-4, "policy and reference are the same before the first update"


def test_a_repaired_generation_configuration_is_saved_everywhere(
    base_job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    directory = configure(shutil.copytree(tiny_model, tmp_path / "model"), GENERATION, temperature=0.9, top_p=0.6)
    (directory / "config.json").write_text(
        json.dumps(json.loads((directory / "config.json").read_text()) | {"pad_token_id": None})
    )
    context = open_stage(sft(base_job, directory, {}, saveSteps=1), tmp_path)
    with trained(context) as trainer:
        save_result(trainer, context, tmp_path / "result")
    for saved in (context.output_dir / "checkpoint-1", tmp_path / "result"):
        found = GenerationConfig.from_pretrained(saved)
        assert (found.do_sample, found.temperature, found.top_p) == (True, 0.9, 0.6)


RESIZED: dict[str, Job] = {
    "in full": {},
    "LoRA": {"lora": {"r": 2}},
    "QLoRA": {"lora": {"r": 2}, "quantization": {"bits": 4}},
    "LoRA and embeddings": {"lora": {"r": 2, "modulesToSave": ["embed_tokens"]}},
}


@pytest.mark.parametrize("fields", RESIZED.values(), ids=RESIZED)
def test_added_rows_are_in_the_result(fields: Job, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    """The data contains new tokens; plain transformers loads the result, with an embedding row for each of them."""
    directory = more_tokens(tiny_model, tmp_path / "more")
    rows = [{"prompt": f"{NEW[0]} {a}", "completion": f" {NEW[1]} {a}"} for a in range(4)]
    job = sft(base_job, directory, {"resizeEmbeddings": "auto"}, **fields, data={"sources": [{"inline": rows}]})
    result = trained_result(job, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result), AutoTokenizer.from_pretrained(result)
    assert model.config.vocab_size % 64 == 0
    assert max(tokenizer.convert_tokens_to_ids(NEW)) < model.config.vocab_size
    table = model.get_input_embeddings().weight
    assert table.shape[0] == model.config.vocab_size and table.isfinite().all()
    old = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight
    if fields and "modulesToSave" not in fields.get("lora", {}):
        assert torch.equal(table[: len(old)], old), "an adapter elsewhere leaves the old rows alone"
        torch.testing.assert_close(table[len(old)], old.mean(0), atol=1e-4, rtol=0)
    else:
        assert not torch.equal(table[len(old)], table[len(old) + 1]), "the new tokens learn"


def test_an_adapter_keeps_added_rows_and_answers(base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    directory = more_tokens(tiny_model, tmp_path / "more")
    lora = {"r": 2, "merge": False, "modulesToSave": ["embed_tokens"]}
    job = sft(base_job, directory, {"resizeEmbeddings": "auto"}, lora=lora, learningRate=1e-2)
    context = open_stage(job, tmp_path)
    with trained(context) as trainer:
        save_result(trainer, context, tmp_path / "result")
        ids = context.tokenizer(f"{NEW[0]} 1 plus 1", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = trainer.model.eval()(input_ids=ids).logits
    loaded = load(str(tmp_path / "result"), device="cpu")
    assert loaded.model.config.vocab_size % 64 == 0
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_preferences_on_added_rows(kind: str, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    """The reference of a full DPO gets the same rows, so that both models are equal before the first step."""
    base_job["spec"]["model"] = {"path": str(more_tokens(tiny_model, tmp_path / "more")), "resizeEmbeddings": "auto"}
    base_job["spec"]["stages"] = stage_of(kind, data=PAIRS, maxLength=64, maxSteps=1)
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
        save_result(trainer, context, tmp_path / "result")
    assert first == pytest.approx(0.6931, abs=1e-3) if kind == "dpo" else first > 0
    assert json.loads((tmp_path / "result" / "config.json").read_text())["vocab_size"] % 64 == 0


DEQUANTIZED: dict[str, Job] = {"in full": {}, **{name: RESIZED[name] for name in ("LoRA", "QLoRA")}}


@pytest.mark.parametrize("fields", DEQUANTIZED.values(), ids=DEQUANTIZED)
def test_a_quantized_model_is_trained_dequantized(fields: Job, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    directory = quantized(tiny_model, tmp_path / "bnb4")
    result = trained_result(sft(base_job, directory, {"dequantize": True}, **fields), tmp_path)
    assert "quantization_config" not in json.loads((result / "config.json").read_text())
    found, original = load_file(result / WEIGHTS), load_file(tiny_model / WEIGHTS)
    assert found.keys() == original.keys()
    for name, weight in original.items():
        assert found[name].dtype == torch.float32 and (found[name] - weight).abs().max() < 0.05, name


def test_an_adapter_names_the_quantized_model_as_its_base(base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    directory = quantized(tiny_model, tmp_path / "bnb4")
    job = sft(base_job, directory, {"dequantize": True}, lora={"r": 2, "merge": False})
    result = trained_result(job, tmp_path)
    assert json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"] == str(directory)
    assert load(str(result), device="cpu").model.is_quantized, "outside of the job the base is used as it is"


@pytest.mark.parametrize("dequantize", [False, True])
def test_an_evaluation_takes_quantized_weights(
    dequantize: bool, base_job: Job, tiny_model: Path, tmp_path: Path
) -> None:
    base_job["spec"]["model"] = {"path": str(quantized(tiny_model, tmp_path / "bnb4")), "dequantize": dequantize}
    data = {"sources": [{"file": "rows.jsonl"}]}
    base_job["spec"]["stages"] = stage_of("evaluate", data=data, metrics=["perplexity"])
    context = open_stage(base_job, tmp_path)
    spec = context.run.job.spec.stages[0].evaluate
    assert spec is not None
    model = open_model(contenders(context.run, 0, spec, Storage(context.run.root))[0], context, spec)
    assert getattr(model, "is_quantized", False) is not dequantize
    rows = eval_rows(spec, context.tokenizer, 64, context.where, tmp_path / "cache", tmp_path)
    assert all(0 < nll < 1000 for nll, _ in likelihoods(model, rows[:2], 0))
