"""Expert scores count the routers' top-k choices of each token, prompts included and padding excluded."""

from __future__ import annotations

import pytest
import torch
from support.esft.expert_models import EXPERTS, FAMILIES, TOP_K, batch, build, logits
from torch import nn

from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.load_report import entropy, load_metrics, peak
from finetune_trainer.esft.routing import RoutingCounter, raw_weights
from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.trainable import prepare

TOKENS = 16 + 10 + 5 + 16


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_sum_to_k_times_tokens(family: str) -> None:
    model = build(family)
    inputs = batch()
    with RoutingCounter(model, gates=True) as counter:
        logits(model, inputs)
    assert [layer.index for layer in expert_layers(model)] == sorted(counter.layers)
    for layer in counter.layers.values():
        assert int(layer.counts.sum()) == TOP_K * TOKENS
        assert int(layer.tokens) == TOKENS
        assert layer.gates.dtype == torch.float64 and bool((layer.gates[layer.counts == 0] == 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_batches(family: str) -> None:
    """Single rows without padding give the scores of the padded batch, so workers can divide the rows."""
    model, inputs = build(family), batch()
    rows = [ids[mask.bool()][None] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    alone = measure_scores(model, [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    together = measure_scores(model, [inputs])
    assert alone.tokens == together.tokens == TOKENS
    for layer, row in together.token.items():
        assert sum(row) == pytest.approx(1, abs=1e-3)
        assert alone.token[layer] == pytest.approx(row, abs=1.5 / (TOP_K * TOKENS))
        assert alone.gate[layer] == pytest.approx(together.gate[layer], abs=0.02)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build("qwen3_moe").train()
    measure_scores(model, [batch()])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_the_split_model_scores_the_same() -> None:
    model, inputs = build("deepseek_v3"), batch()
    before = measure_scores(model, [inputs])
    prepare(model, ExpertConfig({1: (3, 0), 2: (7,)}))
    assert measure_scores(model, [inputs]) == before


class TestRawWeights:
    """Affinities are recovered from renormalised and scaled router weights."""

    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("normalised", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_affinities(self, kind: str, normalised: bool, dtype: torch.dtype) -> None:
        scores = self.logits.double().softmax(-1) if kind == "softmax" else self.logits.double().sigmoid()
        weights, chosen = scores.topk(TOP_K)
        given = (weights / weights.sum(-1, keepdim=True) if normalised else weights) * 2.5
        raw = raw_weights(self.logits, given.to(dtype), chosen, "some_family")
        assert torch.equal(raw, weights)

    def test_a_softmax_over_the_top_k_stays(self) -> None:
        top, chosen = self.logits.topk(TOP_K)
        assert torch.equal(raw_weights(self.logits, top.softmax(-1), chosen, "gpt_oss"), top.softmax(-1).double())

    def test_anything_else_stays(self) -> None:
        chosen = self.logits.topk(TOP_K).indices
        weights = torch.rand(50, TOP_K, generator=torch.Generator().manual_seed(4))
        assert torch.equal(raw_weights(self.logits, weights, chosen, "some_family"), weights.double())


def test_balance() -> None:
    assert entropy([1, 1, 1, 1]) == pytest.approx(1) and entropy([5, 0, 0, 0]) == 0
    assert peak([1, 1, 1, 1]) == 1 and peak([4, 0, 0, 0]) == 4
    assert load_metrics({0: [2, 2], 1: [4, 0]}) == {
        "expert_load_entropy": pytest.approx(0.5),
        "expert_load_peak": 2.0,
        "expert_load_unused": 0.25,
    }


def test_a_dense_model_has_no_routers() -> None:
    counter = RoutingCounter(_Plain())
    with counter:
        counter.model(torch.zeros(1, 4))
    assert counter.take_counts() == {}


class _Plain(nn.Module):
    config = type("Config", (), {"model_type": "plain"})

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_model(inputs)
        return result
