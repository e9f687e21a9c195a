"""Forgetting by ESFT and by full fine-tuning at equal rate and matched loss: `python benchmarks/esft_forgetting.py`.

A small mixture of experts learns two domains, A and B, together. Then it learns a changed A by each method at the same
learning rate, on the same rows, until the held-out loss on it has reached the last target. The benchmark measures how
far the loss on B has risen when the loss on the changed A passes each target, interpolated between two steps, so both
methods are compared at the same loss. A seed that misses a target fails the run. The outcome holds for this model, data
and learning rate only.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare

VOCAB, LENGTH, SEEDS = 128, 24, (0, 1, 2, 3, 4)
RATE, TARGETS, MOST = 3e-3, (3.0, 2.0, 1.5, 1.2), 300
THRESHOLD = 0.6
"""Threshold of the token scores. With 16 experts and top-2 routing the default of 0.2 selects one expert per layer."""
METHODS = ("full", "esft")
DOMAINS = {"A": (0, 64, 7), "B": (64, 128, 5), "changed A": (0, 64, 11)}
"""First token, end, and the step from each token to the next."""


@dataclass(frozen=True)
class Point:
    """A model between two steps."""

    step: float
    target: float
    """Loss on held-out rows of the changed A."""
    other: float
    """Loss on held-out rows of B."""


def main() -> None:
    """Print each seed's rise of B's loss at each target, and the ratios of the means."""
    torch.set_num_threads(1)  # the model is too small for two threads
    measured = {seed: rises(seed) for seed in SEEDS}
    for target in TARGETS:
        each = {method: [found[method][target] for found in measured.values()] for method in METHODS}
        full, esft = (statistics.mean(each[method]) for method in METHODS)
        ratios = [one / other for one, other in zip(each["esft"], each["full"], strict=True)]
        print(
            f"{target:.1f}: B's loss rises by {full:.3f} (full) and {esft:.3f} (ESFT), {esft / full:.2f} of it; "
            f"seeds {min(ratios):.2f} to {max(ratios):.2f}"
        )


def rises(seed: int) -> dict[str, dict[float, float]]:
    """Return the rise of B's loss by each method at each target."""
    base, found = pretrained(seed), {}
    for method in METHODS:
        model, share = prepared(base, method, seed)
        points = list(curve(model, seed))
        crossings = {target: crossing(points, target) for target in TARGETS}
        before = points[0]
        found[method] = {target: at.other - before.other for target, at in crossings.items()}
        for target, at in crossings.items():
            print(
                f"seed {seed} {method:4} {share:4.0%} trained: "
                f"{target:.1f} on the changed A (from {before.target:.1f}) at step {at.step:5.1f}; "
                f"B {before.other:.3f} + {found[method][target]:.3f}",
                flush=True,
            )
    return found


def pretrained(seed: int) -> Any:
    """Return a model trained on A and B."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(250):
        both = torch.cat([rows(name, 16, seed * 10_000 + step) for name in ("A", "B")])
        _step(model, optimizer, both)
    model.config.output_router_logits = False
    return model


def prepared(base: Any, method: str, seed: int) -> tuple[Any, float]:
    """Return a copy of the model, prepared for a method, and the share of its weights that are trained."""
    model = copy.deepcopy(base)
    total = sum(weight.numel() for weight in model.parameters())
    if method == "esft":
        sample = rows("changed A", 64, seed + 77)
        scores = measure_scores(model, [{"input_ids": sample, "attention_mask": torch.ones_like(sample)}])
        prepare(model, ExpertConfig(select_layers(scores.token, THRESHOLD)))
    return model, sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / total


def curve(model: Any, seed: int) -> Iterator[Point]:
    """Yield the model before each step on the changed A, down to the last target."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    for step in range(MOST + 1):
        point = Point(step, loss(model, "changed A", seed), loss(model, "B", seed))
        yield point
        if point.target <= TARGETS[-1]:
            return
        _step(model, optimizer, rows("changed A", 16, 500_000 + seed * 10_000 + step))


def crossing(points: list[Point], target: float) -> Point:
    """Return the point where the loss first passes the target."""
    for before, after in pairwise(points):
        if after.target <= target < before.target:
            part = (before.target - target) / (before.target - after.target)
            other = before.other + part * (after.other - before.other)
            return Point(before.step + part, target, other)
    raise SystemExit(f"{points[-1].target:.3f} after {MOST} steps: {target} was never reached")


def _step(model: Any, optimizer: torch.optim.AdamW, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@torch.no_grad()
def loss(model: Any, name: str, seed: int) -> float:
    """Return the loss on 64 held-out rows of a domain."""
    ids = rows(name, 64, 900_000 + seed)
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def rows(name: str, count: int, seed: int) -> torch.Tensor:
    """Return rows [count, 24] that walk through a domain's tokens; one token in ten is random."""
    first, end, step = DOMAINS[name]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, end - first, (count, 1), generator=generator)
    walk = (start + step * torch.arange(LENGTH)) % (end - first)
    noise = torch.randint(0, end - first, walk.shape, generator=generator)
    return first + torch.where(torch.rand(walk.shape, generator=generator) < 0.1, noise, walk)


if __name__ == "__main__":
    main()
