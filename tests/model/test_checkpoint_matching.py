"""A checkpoint loads only if it has exactly the model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.model.saved_models import WEIGHTS, changed, configure, logits, make_model, save
from torch import Tensor

from finetune_trainer.errors import UserError
from finetune_trainer.model.checkpoint_matching import match_checkpoint
from finetune_trainer.model.config import read_config
from finetune_trainer.model.load import load_whole
from finetune_trainer.model.task import auto_class

Tensors = dict[str, Tensor]


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: one for name, one in tensors.items() if not any(part in name for part in parts)}


def load_fault(directory: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load_whole(str(directory), dtype="auto", **options)
    return str(error.value)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "compiled in DataParallel": lambda name: f"module._orig_mod.{name}",
    "a module around the model": lambda name: f"model.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "each layer compiled": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP and activation checkpointing": lambda name: (
        "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("family", ["llama_dir", "moe_dir"])
def test_names_left_by_wrappers_are_mapped_and_not_saved_again(
    wrapper: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(family)
    directory = changed(source, tmp_path / "wrapped", renamed(WRAPPED[wrapper]))
    model = load_whole(str(directory), dtype="auto")
    assert torch.equal(logits(model), logits(load_whole(str(source), dtype="auto")))
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(source / WEIGHTS).keys()


def test_what_was_mapped_is_said(llama_dir: Path, tmp_path: Path) -> None:
    directory = str(changed(llama_dir, tmp_path / "compiled", renamed(WRAPPED["torch.compile"])))
    match = match_checkpoint(directory, read_config(directory), auto_class("causal"))
    assert list(match.notes()) == [
        "the checkpoint's names contain `_orig_mod.`, left by a wrapper: removed while loading"
    ]
    assert not list(match_checkpoint(str(llama_dir), read_config(str(llama_dir)), auto_class("causal")).notes())


def test_a_head_that_is_not_there_is_no_random_one(llama_dir: Path, tmp_path: Path) -> None:
    fault = load_fault(changed(llama_dir, tmp_path / "headless", without("lm_head")))
    assert "lacks 1 weight (lm_head.weight) of LlamaForCausalLM" in fault and "tie_word_embeddings" in fault


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    tied = make_model(tie_word_embeddings=True)
    directory = save(tied, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / WEIGHTS)
    assert torch.equal(logits(load_whole(str(directory), dtype="auto")), logits(tied))


def test_half_precision_is_checked_alike(llama_dir: Path, tmp_path: Path) -> None:
    half = changed(llama_dir, tmp_path / "half", lambda all: {name: one.bfloat16() for name, one in all.items()})
    assert load_whole(str(half), dtype=torch.bfloat16).dtype == torch.bfloat16
    headless = changed(half, tmp_path / "headless", without("lm_head"))
    assert "lm_head.weight" in load_fault(headless)


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "fewer layers": ({"num_hidden_layers": 1}, "holds 9 weights (model.layers.1."),
    "more layers": ({"num_hidden_layers": 3}, "lacks 9 weights (model.layers.2."),
    "biases": ({"attention_bias": True}, "lacks 8 weights (model.layers.0.self_attn.k_proj.bias"),
    "another width": ({"intermediate_size": 48}, "layers.0.mlp.down_proj.weight ([32, 64] against [32, 48])"),
    "another vocabulary": ({"vocab_size": 400}, "model.embed_tokens.weight (["),
    "another family": ({"model_type": "gpt_neox"}, "that GPTNeoXForCausalLM has no place for"),
}


@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_configuration_unlike_its_weights_is_refused(unlike: str, llama_dir: Path, tmp_path: Path) -> None:
    fields, message = UNLIKE[unlike]
    directory = configure(shutil.copytree(llama_dir, tmp_path / "unlike"), **fields)
    fault = load_fault(directory)
    assert message in fault
    assert fault.count("model.layers") <= 10, "five names of each kind are enough"


BROKEN_EXPERTS = {
    "one matrix": (without("layers.1.mlp.experts.3.up_proj"), "lacks 1 weight (model.layers.1.mlp.experts.3.up_proj"),
    "one expert": (without("layers.1.mlp.experts.3."), "experts.down_proj ([3, 32, 32] against [4, 32, 32])"),
    "all of a layer": (without("layers.1.mlp.experts."), "lacks 2 weights (model.layers.1.mlp.experts.down_proj"),
    "the router": (without("layers.0.mlp.gate."), "lacks 1 weight (model.layers.0.mlp.gate.weight)"),
}


@pytest.mark.parametrize("lost", BROKEN_EXPERTS)
def test_lost_experts_are_found(lost: str, moe_dir: Path, tmp_path: Path) -> None:
    change, message = BROKEN_EXPERTS[lost]
    assert message in load_fault(changed(moe_dir, tmp_path / "broken", change))


def sharded(source: Path, target: Path) -> Path:
    """Return a copy of the checkpoint in several files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(WEIGHTS))
    load_whole(str(source), dtype="auto").save_pretrained(target, max_shard_size="30KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


def test_a_sharded_checkpoint_loads_whole(llama_dir: Path, tmp_path: Path) -> None:
    directory = sharded(llama_dir, tmp_path / "sharded")
    assert torch.equal(
        logits(load_whole(str(directory), dtype="auto")), logits(load_whole(str(llama_dir), dtype="auto"))
    )


def test_a_shard_with_another_ones_content_is_found(llama_dir: Path, tmp_path: Path) -> None:
    directory = sharded(llama_dir, tmp_path / "sharded")
    first, second, *_ = sorted(directory.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert "the checkpoint lacks" in load_fault(directory)


def test_a_shard_that_is_not_there_is_named(llama_dir: Path, tmp_path: Path) -> None:
    from finetune_trainer.model.weights import weight_faults

    directory = sharded(llama_dir, tmp_path / "sharded")
    first, *_ = sorted(directory.glob("model-*.safetensors"))
    first.unlink()
    assert [fault for fault in weight_faults(directory)] == [f"{first} does not exist"]


def test_a_single_file_counts_before_an_index(llama_dir: Path, tmp_path: Path) -> None:
    """Transformers reads the single file and ignores the index, so an outdated index in the directory is no error."""
    from finetune_trainer.model.weights import weight_faults

    directory = shutil.copytree(llama_dir, tmp_path / "both")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not list(weight_faults(directory))
    load_whole(str(directory), dtype="auto")


def test_a_reward_model_in_training_gets_a_new_head(llama_dir: Path) -> None:
    config = read_config(str(llama_dir))
    config.num_labels = 1
    match = match_checkpoint(str(llama_dir), config, auto_class("reward"), new_head=True)
    assert (match.faults, match.new, match.unused) == (0, ("score.weight",), ("lm_head.weight",))
    assert match_checkpoint(str(llama_dir), config, auto_class("reward")).missing == ("score.weight",)


def test_other_heads_and_old_buffers_are_not_missed(llama_dir: Path, tmp_path: Path) -> None:
    extra = {
        "score.weight": torch.zeros(1, 32),
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.0.attn.masked_bias": torch.zeros(()),
    }
    directory = str(changed(llama_dir, tmp_path / "extra", lambda tensors: tensors | extra))
    match = match_checkpoint(directory, read_config(directory), auto_class("causal"))
    assert match.faults == 0 and match.unused == ("score.weight", "v_head.summary.weight")
    load_whole(directory, dtype="auto")


def test_a_quantized_base_is_checked_as_it_is_saved(llama_dir: Path, tmp_path: Path) -> None:
    from finetune_api.training import Quantization
    from finetune_trainer.model.load import quantization_config

    compiled = changed(llama_dir, tmp_path / "compiled", renamed(WRAPPED["torch.compile"]))
    options = {"quantization_config": quantization_config(Quantization(), torch.float32)}
    assert load_whole(str(compiled), dtype=torch.float32, **options).is_quantized
    headless = changed(llama_dir, tmp_path / "headless", without("lm_head"))
    assert "lm_head.weight" in load_fault(headless, quantization_config=options["quantization_config"])
