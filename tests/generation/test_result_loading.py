"""Loading of models, adapters and job results, and the errors for anything else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune_trainer.errors import UserError
from finetune_trainer.generation.generate import generate
from finetune_trainer.generation.load import load


def test_a_model_directory(llama_dir: Path) -> None:
    loaded = load(str(llama_dir), device="cpu")
    assert loaded.kind == "causal"
    assert not loaded.model.training
    assert loaded.tokenizer.pad_token == "<|endoftext|>"


def test_a_masked_model(masked_dir: Path) -> None:
    assert load(str(masked_dir), device="cpu").kind == "masked"


def test_a_job_loads_its_last_finished_stage(job_dir: Path) -> None:
    assert isinstance(load(str(job_dir), device="cpu").model, PeftModel)
    (job_dir / "stages" / "02-sft" / "done.json").unlink()
    assert not isinstance(load(str(job_dir), device="cpu").model, PeftModel)


def test_a_stage_directory_is_its_result(job_dir: Path) -> None:
    stage = job_dir / "stages" / "02-sft"
    assert generate(load(str(stage), "cpu"), ["abs"]) == generate(load(str(stage / "result"), "cpu"), ["abs"])


def test_a_moved_adapter_finds_its_base(job_dir: Path, tmp_path: Path) -> None:
    before = generate(load(str(job_dir), device="cpu"), ["What does abs do?"])
    moved = tmp_path / "elsewhere" / "copy"
    moved.parent.mkdir()
    shutil.move(job_dir, moved)
    assert generate(load(str(moved), device="cpu"), ["What does abs do?"]) == before


def test_a_base_that_is_gone_is_named(job_dir: Path) -> None:
    shutil.rmtree(job_dir / "stages" / "01-pretrain")
    with pytest.raises(UserError, match=r"base model '.*01-pretrain/result' does not exist"):
        load(str(job_dir), device="cpu")


def test_pickled_adapters_are_refused(job_dir: Path) -> None:
    result = job_dir / "stages" / "02-sft" / "result"
    torch.save(load_file(result / "adapter_model.safetensors"), result / "adapter_model.bin")
    (result / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load(str(job_dir), device="cpu")


def test_pickled_models_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama_dir, tmp_path / "model")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        load(str(copy), device="cpu")


def test_a_broken_weight_file_is_a_user_error(llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama_dir, tmp_path / "model")
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="can't be loaded"):
        load(str(copy), device="cpu")


def test_weights_of_another_shape_are_a_user_error(llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama_dir, tmp_path / "model")
    save_file({"model.norm.weight": torch.ones(3)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        load(str(copy), device="cpu")
    assert "lacks 20 weights (lm_head.weight, model.embed_tokens.weight, " in str(error.value)
    assert "shape of 1 weight (model.norm.weight ([3] against [32]))" in str(error.value)


def test_an_unfinished_job_lists_its_stages(tmp_path: Path) -> None:
    for name in ("00-tokenizer", "01-pretrain"):
        (tmp_path / "stages" / name / "result").mkdir(parents=True)
    (tmp_path / "stages" / "00-tokenizer" / "done.json").write_text("{}")
    with pytest.raises(UserError) as error:
        load(str(tmp_path))
    assert "stages/00-tokenizer (finished, no model), stages/01-pretrain (not finished)" in str(error.value)


def test_a_directory_of_jobs_names_them(job_dir: Path) -> None:
    with pytest.raises(UserError, match=r"found job; did you mean '.*runs/job'\?"):
        load(str(job_dir.parent))


def test_a_misspelt_path_names_the_nearest(job_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no directory '.*jbo': did you mean `job`\?"):
        load(str(job_dir.parent / "jbo"))


def test_an_unknown_device_is_named(llama_dir: Path) -> None:
    with pytest.raises(UserError, match="device 'gpu'"):
        load(str(llama_dir), device="gpu")


def test_a_model_without_a_tokenizer_is_a_user_error(llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama_dir, tmp_path / "model", ignore=shutil.ignore_patterns("token*", "chat*"))
    with pytest.raises(UserError, match="tokenizer"):
        load(str(copy), device="cpu")
