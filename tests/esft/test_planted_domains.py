"""ESFT on planted domains: tokens of A and of B are routed to different experts, so the exact outcome is known."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.esft.expert_models import EXPERTS, VOCAB, batch, build, logits, train

from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare

HALF = (VOCAB + 3) // 2
A, B = (3, HALF), (HALF, VOCAB)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with models this small, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted() -> Any:
    """Return a model that routes tokens of A to its first half of experts and tokens of B to the second half."""
    model = build("qwen3_moe", moe_intermediate_size=64, initializer_range=0.1)
    embedding = model.get_input_embeddings().weight.data
    embedding[:, 0] = 0
    embedding[A[0] : A[1], 0], embedding[B[0] : B[1], 0] = 1.0, -1.0
    for layer in expert_layers(model):
        layer.router.weight.data[:, 0] = torch.tensor([20.0] * (EXPERTS // 2) + [-20.0] * (EXPERTS // 2))
    return model


def domain(tokens: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Return rows that step through the domain's tokens by 7, a pattern that the model can learn."""
    inputs, (low, high) = batch(rows=8, length=16, low=tokens[0], high=tokens[1], seed=seed), tokens
    steps = torch.arange(16) * 7
    return inputs | {"input_ids": low + (inputs["input_ids"][:, :1] - low + steps) % (high - low)}


@torch.no_grad()
def loss(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return float(model.eval()(**inputs, labels=labels).loss)


def test_training_a_domain_leaves_the_other_to_the_bit() -> None:
    model, mine, other = planted(), domain(A, 1), domain(B, 2)
    chosen = select_layers(measure_scores(model, [mine]).token, 0.6)
    assert all(expert < EXPERTS // 2 for ids in chosen.values() for expert in ids)
    prepare(model, ExpertConfig(chosen))
    before, untouched = loss(model, mine), logits(model, other)
    train(model, mine, steps=60, rate=2e-2)
    assert loss(model, mine) <= 0.8 * before
    assert torch.equal(logits(model, other), untouched)


def test_tasks_share_experts_with_themselves() -> None:
    """The Jaccard index of two selections is at least 0.6 for the same task and at most 0.25 for different tasks."""
    model = planted()
    first, again, other = (
        {
            (layer, expert)
            for layer, ids in select_layers(measure_scores(model, [domain(tokens, seed)]).token, 0.6).items()
            for expert in ids
        }
        for tokens, seed in ((A, 1), (A, 3), (B, 2))
    )
    assert len(first & again) >= 0.6 * len(first | again)
    assert len(first & other) <= 0.25 * len(first | other)


def test_esft_forgets_less_than_full_fine_tuning_does_at_the_same_loss() -> None:
    """With one benchmark seed, the other domain's loss rises at most 0.85 times as far at every target.

    Five seeds measured 0.01 to 0.18 times.
    """
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "esft_forgetting.py"))
    found = benchmark["rises"](1)
    assert len(found["full"]) == len(found["esft"]) >= 4
    for target, full in found["full"].items():
        assert full > 0 and found["esft"][target] <= 0.85 * full
