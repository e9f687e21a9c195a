"""LoRA on stacked experts is computed from its factors: PEFT's values without PEFT's copies of whole stacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.esft.expert_models import batch, build

from finetune_api.training import Lora
from finetune_trainer.model.expert_matmul import FactoredStack, compute_by_autocast, factor_adapters
from finetune_trainer.model.lora import lora_config

Gradients = dict[str, torch.Tensor]


def adapted(family: str, r: int = 2, size: float = 0.1, **how: Any) -> Any:
    """Return a tiny model with random LoRA adapters on all layers."""
    model = build(family, **how)
    with_lora = get_peft_model(model, lora_config(Lora(r=r), model))
    torch.manual_seed(1)
    for name, weight in with_lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=size)
    return with_lora.train()


def step(model: Any) -> tuple[torch.Tensor, Gradients]:
    """Return the logits and gradients of one batch."""
    inputs = batch()
    model.zero_grad()
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return output.logits.detach(), {name: gradient.clone() for name, gradient in trained.items()}


@pytest.fixture
def summed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes of the stacks to which adapters are added."""
    shapes: list[tuple[int, ...]] = []
    library = torch.baddbmm

    def recorded(stack: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(stack.shape))
        return library(stack, *args, **kwargs)

    monkeypatch.setattr(torch, "baddbmm", recorded)
    yield shapes


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_values_and_gradients_are_pefts(family: str, summed: list[tuple[int, ...]]) -> None:
    model = adapted(family)
    expected, gradients = step(model)
    assert summed, "PEFT no longer sums up whole stacks: expert_products can go"
    summed.clear()
    factor_adapters(model)
    compute_by_autocast(model.get_base_model())
    found, own = step(model)
    assert not summed
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == gradients.keys() and any("experts" in name for name in own)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def kept_bytes(model: Any) -> int:
    """Return the bytes that autograd saves in a forward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.tensor([[3, 4]]))
    del output
    return sum(size for address, size in kept.items() if address not in weights)


def test_autograd_keeps_no_stack() -> None:
    """PEFT saves 2 * 64 * 32 + 32 * 64 float32 weights for each of 8 experts in 3 layers.

    The factors, whose rank 2 is padded to 8, have 8 * (32 + 128) + 8 * (64 + 32).
    """
    model = adapted("qwen3_moe", moe_intermediate_size=64)
    stacks, factors = 3 * 8 * (2 * 64 * 32 + 32 * 64) * 4, 3 * 8 * 8 * (32 + 128 + 64 + 32) * 4
    before = kept_bytes(model)
    factor_adapters(model)
    assert before - kept_bytes(model) == pytest.approx(stacks - factors, rel=0.01)


def test_other_implementations_are_pefts_own(summed: list[tuple[int, ...]]) -> None:
    """The loop over experts indexes single rows of a stack, for which PEFT still adds the adapter."""
    model = adapted("qwen3_moe", implementation="eager")
    expected, _ = step(model)
    factor_adapters(model)
    summed.clear()
    torch.testing.assert_close(step(model)[0], expected, rtol=0, atol=0)
    assert summed


def test_a_merged_model_is_the_adapted_one() -> None:
    model = adapted("qwen3_moe")
    factor_adapters(model)
    expected = step(model)[0]
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, expected, rtol=1e-4, atol=1e-5)


def test_other_uses_of_a_stack_get_the_sum() -> None:
    stack, left, right = torch.randn(4, 6, 5), torch.randn(4, 6, 2), torch.randn(4, 2, 5)
    factored, whole = FactoredStack(stack, left, right, 0.5), stack + 0.5 * left @ right
    inputs = torch.randn(4, 3, 6)
    torch.testing.assert_close(torch.bmm(inputs, factored), inputs @ whole)  # type: ignore[arg-type]
    torch.testing.assert_close(factored[1], whole[1])
    torch.testing.assert_close(factored.transpose(0, 2), whole.transpose(0, 2))
    torch.testing.assert_close(factored.transpose(1, 2).whole(), whole.transpose(1, 2))  # type: ignore[union-attr]
    assert tuple(factored.shape) == (4, 6, 5)


def test_transformers_own_replacement_takes_the_factors(summed: list[tuple[int, ...]]) -> None:
    """Transformers uses this fallback on GPUs older than compute capability 8.0."""
    stack, left, right = torch.randn(3, 6, 5), torch.randn(3, 6, 8), torch.randn(3, 8, 5)
    inputs, ends = torch.randn(7, 6), torch.tensor([2, 2, 7], dtype=torch.int32)
    found = torch.ops.transformers.grouped_mm_fallback(inputs, FactoredStack(stack, left, right, 0.5), offs=ends)
    whole = stack + 0.5 * left @ right
    torch.testing.assert_close(found, torch.cat([inputs[:2] @ whole[0], inputs[2:] @ whole[2]]))
    assert not summed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_float32_stacks_follow_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`grouped_mm` itself ignores autocast; the gradients reach the float32 weights."""
    formats: list[tuple[torch.dtype, torch.dtype]] = []
    library = torch.nn.functional.grouped_mm

    def recorded(inputs: torch.Tensor, weight: torch.Tensor, **more: Any) -> torch.Tensor:
        formats.append((inputs.dtype, weight.dtype))
        return library(inputs, weight, **more)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", recorded)
    model = build(family).train()
    compute_by_autocast(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch(), labels=batch()["input_ids"]).loss
    loss.backward()
    assert len(formats) == 2 * 3 and set(formats) == {(torch.bfloat16, torch.bfloat16)}
    stacks = [weight for name, weight in model.named_parameters() if weight.ndim == 3 and "experts" in name]
    assert {weight.dtype for weight in stacks} == {torch.float32}
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in stacks)
    formats.clear()
    model(**batch())
    assert set(formats) == {(torch.float32, torch.float32)}


def test_a_failing_pass_leaves_the_stacks_in_place() -> None:
    model = build("qwen3_moe")
    compute_by_autocast(model)
    experts = model.model.layers[0].mlp.experts
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        experts(torch.randn(4, 7), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    assert isinstance(experts.gate_up_proj, torch.nn.Parameter)
