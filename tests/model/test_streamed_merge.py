"""A merge that streams the base's files writes the same files as PEFT's merge of the whole model, in less memory."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.jobs.composite_models import build
from support.model.saved_models import logits, make_model, make_tokenizer, save
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_api.training import Lora
from finetune_trainer.errors import UserError
from finetune_trainer.generation.merge import merge
from finetune_trainer.model.adapter import attach_adapter
from finetune_trainer.model.base_files import open_base
from finetune_trainer.model.load import load_whole
from finetune_trainer.model.lora import lora_config
from finetune_trainer.model.merged_files import MergePlan, plan_merge
from finetune_trainer.model.task import auto_class
from finetune_trainer.model.vocabulary import resize_embeddings

SHARD = 60_000
AUTO = auto_class("causal")
CLOSE = 1e-5
"""Tolerance for float32 logits: a separate adapter and a merged one add in different orders."""
PEAK_SHARD = 32 << 20


def _base(directory: Path, family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    composite = family == "gemma3"
    model = build(family, dtype) if composite else make_model(family, **fields).to(dtype)
    return save(model, directory / "base")


def _adapter(base: Path, directory: Path, rows: int | None = None, **lora: Any) -> Path:
    """Save an adapter of a job whose trained weights all differ from their initial values."""
    model = load_whole(str(base), AUTO, dtype="auto")
    if rows is not None:
        resize_embeddings(model, rows)
    return _trained_adapter(model, lora_config(Lora.model_validate({"r": 4} | lora), model), base, directory)


def _peft_adapter(base: Path, directory: Path, modules: list[str], **more: Any) -> Path:
    """Save an adapter that PEFT can create and a job cannot."""
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", **more)
    return _trained_adapter(load_whole(str(base), AUTO, dtype="auto"), config, base, directory)


def _trained_adapter(model: PreTrainedModel, config: LoraConfig, base: Path, directory: Path) -> Path:
    torch.manual_seed(1)
    adapted: Any = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = (weight.data.float() + 0.05 * torch.randn(weight.shape)).to(weight.dtype)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(directory / "adapter")
    make_tokenizer().save_pretrained(directory / "adapter")
    return directory / "adapter"


def _plan(base: Path, adapter: Path, rows: int | None = None) -> MergePlan | None:
    opened = open_base(str(base), AUTO, rows=rows)
    return None if opened is None else plan_merge(opened, adapter)


def _streamed(base: Path, adapter: Path, directory: Path, rows: int | None = None) -> Path:
    plan = _plan(base, adapter, rows)
    assert plan is not None
    plan.write(directory / "streamed", SHARD)
    return directory / "streamed"


def _by_peft(base: Path, adapter: Path, directory: Path, rows: int | None = None) -> Path:
    """Return the files of PEFT's merge of the whole model, in float32 and rounded once."""
    model = load_whole(str(base), AUTO, dtype="auto")
    if rows is not None:
        resize_embeddings(model, rows)
    whole, saved = model.dtype, {name: weight.dtype for name, weight in model.state_dict().items()}
    adapted: Any = attach_adapter(model.float(), adapter)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    for name, weight in chain(merged.named_parameters(), merged.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to(saved.get(name, whole))
    merged.save_pretrained(directory / "peft", max_shard_size=SHARD)
    return directory / "peft"


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        assert path.stat().st_size < 3 * SHARD
        found |= load_file(path)
    return found


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", torch.float32, {}, {}),
    "bfloat16": ("llama", torch.bfloat16, {}, {"useRslora": True}),
    "dora": ("llama", torch.bfloat16, {}, {"useDora": True}),
    "tied": ("qwen3", torch.float32, {"tie_word_embeddings": True}, {"modulesToSave": ["embed_tokens"]}),
    "untied": ("llama", torch.float32, {}, {"modulesToSave": ["lm_head", "embed_tokens"]}),
    "transposed": ("gpt2", torch.float32, {"n_positions": 64}, {}),
    "experts": ("qwen3_moe", torch.float32, {}, {}),
    "bfloat16 experts": ("qwen3_moe", torch.bfloat16, {}, {}),
    "composite": ("gemma3", torch.bfloat16, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_pefts_merge(case: str, tmp_path: Path) -> None:
    family, dtype, fields, lora = CASES[case]
    base = _base(tmp_path, family, dtype, **fields)
    adapter = _adapter(base, tmp_path, **lora)
    found, expected = (_tensors(way(base, adapter, tmp_path)) for way in (_streamed, _by_peft))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name
    origin = load_file(base / "model.safetensors")
    assert sum(not torch.equal(weight, origin[name]) for name, weight in found.items()) >= 8
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "peft" / name).read_text()


def test_embeddings_with_added_rows_are_merged(tmp_path: Path) -> None:
    base = _base(tmp_path, "llama")
    rows = len(make_tokenizer()) + 8
    adapter = _adapter(base, tmp_path, rows)
    found, expected = (_tensors(way(base, adapter, tmp_path, rows)) for way in (_streamed, _by_peft))
    assert found["model.embed_tokens.weight"].shape[0] == found["lm_head.weight"].shape[0] == rows
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@torch.no_grad()
def test_an_adapter_on_tied_embeddings_is_added_once(tmp_path: Path) -> None:
    """PEFT's own merge adds it twice: to the embedding and to the head, which share one weight."""
    base = _base(tmp_path, "qwen3", tie_word_embeddings=True)
    adapter = _peft_adapter(base, tmp_path, ["q_proj", "embed_tokens"], ensure_weight_tying=True)
    expected = logits(attach_adapter(load_whole(str(base), AUTO, dtype="auto"), adapter).eval())
    merge(str(adapter), tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, expected, atol=CLOSE, rtol=0)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = _base(tmp_path, "llama")
    adapter = _adapter(base, tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 2] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"merged weight model.layers.1.self_attn.q_proj.weight is not finite"):
        merge(str(adapter), tmp_path / "merged")


def test_what_cannot_be_streamed_is_merged_as_a_whole(tmp_path: Path) -> None:
    """An adapter with its own biases changes weights that the names in its files do not show."""
    base = _base(tmp_path, "qwen2")
    _peft_adapter(base, tmp_path, ["q_proj"], lora_bias=True)
    assert _plan(base, tmp_path / "adapter") is None
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(load_whole(str(base), AUTO, dtype="auto"), tmp_path / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("family", "files"), [("llama", 3.0), pytest.param("qwen3_moe", 3.0, marks=pytest.mark.long)])
def test_memory_stays_near_one_file(family: str, files: float, tmp_path: Path) -> None:
    """Merge a bfloat16 model of five files; a merge in memory would peak at the whole model in float32, plus copies.

    The names and shapes of 40 layers of experts alone take half a file here.
    """
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 30}
    experts = {"num_hidden_layers": 40, "num_experts": 8, "moe_intermediate_size": 192, "hidden_size": 384}
    base = _base(tmp_path, family, torch.bfloat16, **(wide if family == "llama" else experts))
    assert (base / "model.safetensors").stat().st_size > 4 * PEAK_SHARD
    adapter = _adapter(base, tmp_path)
    small = _base(tmp_path / "small", family, torch.bfloat16)
    command = [sys.executable, str(Path(__file__).with_name("merge_peak.py")), str(adapter), str(tmp_path / "merged")]
    command += [str(PEAK_SHARD), str(_adapter(small, tmp_path / "small"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) >= 5
    assert int(run.stdout.split()[-1]) < files * PEAK_SHARD
