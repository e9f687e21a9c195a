"""Splitting expert weights is exact: equal logits, equal gradients, and only the selected rows change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.esft.expert_models import FAMILIES, batch, build, logits, train
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.errors import UserError
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare, tuned_modules
from finetune_trainer.model.precision import train_in_float32

IMPLEMENTATIONS = ("eager", "grouped_mm")


def chosen(model: Any, **switches: bool) -> ExpertConfig:
    """Select two experts of each layer, not in order; leave the last layer whole."""
    layers = [layer.index for layer in expert_layers(model)]
    return ExpertConfig({index: (6, 1) for index in layers[:-1]}, **switches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_before_training_are_equal_to_the_bit(family: str, implementation: str, dtype: torch.dtype) -> None:
    model, inputs = build(family, implementation, dtype), batch()
    before = logits(model, inputs)
    prepare(model, ExpertConfig(select_layers(measure_scores(model, [inputs]).token, 0.3)))
    assert torch.equal(logits(model, inputs), before)


def test_logits_of_a_loaded_model_are_equal_to_the_bit(tmp_path: Path) -> None:
    """A loaded model's weights are mapped from a file at unaligned addresses, and there are few tokens per expert."""
    build("granitemoe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    model.config.output_router_logits = False
    for seed in range(5):
        inputs = batch(seed=seed)
        before = logits(model, inputs)
        split = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
        split.config.output_router_logits = False
        prepare(split, chosen(split))
        assert torch.equal(logits(split, inputs), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_rows_of_the_whole_ones(family: str, implementation: str) -> None:
    split, inputs = build(family, implementation), batch()
    whole = copy.deepcopy(split)
    prepare(split, chosen(split))
    for model in (split, whole):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    wholes = {layer.index: layer for layer in expert_layers(whole)}
    for layer, experts in tuned_modules(split):
        for stack in layer.stacks:
            rows = getattr(wholes[layer.index].experts, stack).grad[list(experts.tuned_ids)]
            mine = getattr(experts, f"{stack}_tuned").grad
            assert torch.equal(mine, rows) or torch.allclose(mine, rows, rtol=1e-6, atol=0)
            assert implementation != "eager" or torch.equal(mine, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_chosen_rows_move(family: str) -> None:
    model, inputs = build(family), batch()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = chosen(model)
    prepare(model, config)
    optimizer = train(model, inputs, steps=5)
    tuned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    states = [value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(states) == 2 * tuned
    for name, weight in model.state_dict().items():
        place, _, part = name.rpartition("_")
        if part not in ("frozen", "tuned"):
            assert torch.equal(weight, before[name]), name
            continue
        experts = model.get_submodule(name.rpartition(".")[0])
        rows = before[place][list(getattr(experts, f"{part}_ids"))]
        assert torch.equal(weight, rows) is (part == "frozen"), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_expert_without_tokens_has_a_gradient_of_zero(implementation: str) -> None:
    model, inputs = build("qwen3_moe", implementation), _few()
    used = {
        index: {expert for expert, score in enumerate(row) if score > 0}
        for index, row in measure_scores(model, [inputs]).token.items()
    }
    config = ExpertConfig({index: tuple(sorted(set(range(8)) - ids)[:1]) for index, ids in used.items()})
    assert all(config.experts.values())
    prepare(model, config)
    before = logits(model, inputs)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for weight in model.parameters():
        assert not weight.requires_grad or (weight.grad is not None and not weight.grad.any())
    assert torch.equal(logits(model, inputs), before)


def _few() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_expert_may_be_chosen(implementation: str) -> None:
    model, inputs = build("gpt_oss", implementation), batch()
    before = logits(model, inputs)
    prepare(model, ExpertConfig({layer.index: (7, 6, 5, 4, 3, 2, 1, 0) for layer in expert_layers(model)}))
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain, inputs = build("deepseek_v2"), batch()
    prepare(plain, chosen(plain))
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, other.grad)


def test_masters_are_float32_and_compute_in_half_precision() -> None:
    model, inputs = build("qwen2_moe", dtype=torch.bfloat16), batch()
    before = logits(model, inputs)
    prepare(model, chosen(model))
    train_in_float32(model)
    kinds = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert kinds == {torch.float32}
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize(
    ("switches", "trained", "frozen"),
    [
        ({"shared_experts": True}, "shared_expert", "self_attn"),
        ({"non_expert_modules": True}, "self_attn", "shared_expert"),
    ],
)
def test_switches(switches: dict[str, bool], trained: str, frozen: str) -> None:
    model = build("qwen2_moe")
    prepare(model, chosen(model, **switches))
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(trained in name for name in names) and not any(frozen in name for name in names)
    assert not any("_frozen" in name or name[-17:] == "experts.down_proj" for name in names)


def test_a_dense_family_is_refused_by_name() -> None:
    fields = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32, **fields))
    with pytest.raises(UserError, match=r"stages\[0\]\.esft: llama has no experts"):
        expert_layers(model, "stages[0].esft")


def test_a_family_of_another_shape_is_refused_with_the_reason() -> None:
    model = build("mixtral")
    model.model.layers[1].mlp.experts.scale = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(
        UserError, match="mixtral does not have the structure that esft supports: its experts hold scale"
    ):
        expert_layers(model)
    model = build("mixtral")
    del model.model.layers[0].mlp.gate.top_k
    with pytest.raises(UserError, match="no router with a top_k"):
        expert_layers(model)
