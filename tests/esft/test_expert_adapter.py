"""Files of trained experts: the names of the Hub, only the trained weights, and lossless loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.esft.expert_models import FAMILIES, batch, build, logits, train
from transformers import AutoModelForCausalLM

from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter import apply_adapter, trained_tensors, write_adapter
from finetune_trainer.esft.adapter_files import ADAPTER_WEIGHTS, adapter_base, is_expert_adapter
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.trainable import prepare
from finetune_trainer.model.load import load_whole
from finetune_trainer.model.saved_model import root_of

HUB = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.6.w1.weight",
    "gpt_oss": "model.layers.0.mlp.experts.6.gate_up_proj_bias",
    "granitemoe": "model.layers.0.block_sparse_moe.experts.6.gate_up_proj",
}


def saved(family: str, directory: Path, **switches: bool) -> tuple[Any, ExpertConfig, Path]:
    """Return a trained split model, its configuration and its adapter directory; the base is saved next to it."""
    build(family).save_pretrained(directory / "base")
    model = _load(directory / "base")
    layers = [layer.index for layer in expert_layers(model)]
    config = ExpertConfig({index: (6, 1) for index in layers[:-1]}, **switches)
    prepare(model, config)
    train(model, batch(), steps=3)
    tensors = trained_tensors(model, config, torch.float32, keep=True)
    write_adapter(directory / "adapter", tensors, config, str(directory / "base"))
    return model, config, directory / "adapter"


def _load(directory: Path) -> Any:
    model = load_whole(str(directory), dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.config.output_router_logits = False
    return aligned(model)


def aligned(model: Any) -> Any:
    """Copy the weights out of the mapped file: on a CPU the last bit may depend on their address."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    return model


@pytest.mark.parametrize("switches", [{}, {"shared_experts": True, "non_expert_modules": True}], ids=["experts", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_merge_reload_is_exact(family: str, switches: dict[str, bool], tmp_path: Path) -> None:
    model, _, adapter = saved(family, tmp_path, **switches)
    trained = logits(model, batch())
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sum(tensor.numel() for tensor in tensors.values()) == tuned
    header = int.from_bytes((adapter / ADAPTER_WEIGHTS).read_bytes()[:8], "little")
    assert (adapter / ADAPTER_WEIGHTS).stat().st_size == 4 * tuned + 8 + header
    merged = _load(adapter)
    assert torch.equal(logits(merged, batch()), trained)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="grouped_mm")
    plain.config.output_router_logits = False
    assert torch.equal(logits(aligned(plain), batch()), trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_hubs(family: str, tmp_path: Path) -> None:
    _, config, adapter = saved(family, tmp_path)
    names = set(load_file(adapter / ADAPTER_WEIGHTS))
    first = min(config.experts)
    assert HUB.get(family, f"model.layers.{first}.mlp.experts.6.gate_proj.weight") in names
    if family not in ("gpt_oss", "granitemoe"):  # these are stacked on the Hub too
        assert names <= set(load_file(tmp_path / "base" / "model.safetensors"))
    assert json.loads((adapter / "expert_config.json").read_text())["experts"][str(first)] == [6, 1]


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    model, _, adapter = saved("qwen3_moe", tmp_path)
    again = _load(adapter)
    assert again.name_or_path == str(adapter) and root_of(str(adapter)) == str(tmp_path / "base")
    other = ExpertConfig({2: (0,)})
    prepare(again, other)
    train(again, batch(seed=5), steps=2)
    write_adapter(tmp_path / "second", trained_tensors(again, other, torch.float32, keep=True), other, str(adapter))
    assert is_expert_adapter(tmp_path / "second") and adapter_base(tmp_path / "second") == str(adapter)
    assert torch.equal(logits(_load(tmp_path / "second"), batch()), logits(again, batch()))
    assert not torch.equal(logits(again, batch()), logits(model, batch()))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    _, _, adapter = saved("qwen3_moe", tmp_path)
    with pytest.raises(UserError, match="does not fit mixtral"):
        apply_adapter(build("mixtral"), adapter)
    with pytest.raises(UserError, match="does not fit qwen3_moe"):
        apply_adapter(build("qwen3_moe", moe_intermediate_size=24), adapter)


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    _, config, adapter = saved("qwen3_moe", tmp_path)
    (adapter / "expert_config.json").write_text(json.dumps(config.to_json()))
    with pytest.raises(UserError, match="names no base model"):
        load_whole(str(adapter))
