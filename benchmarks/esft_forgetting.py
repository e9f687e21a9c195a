"""Forgetting by ESFT and by full fine-tuning at equal rate and matched loss: `python benchmarks/esft_forgetting.py`.

A small mixture of experts learns two domains, A and B, together. Then it learns a changed A by each method, until the
loss on held-out rows of it falls to the same target. What is measured is how much the loss on B has risen. The outcome
holds for this model, data and rate; it proves nothing about others.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.esft.scores import measure_scores
from finetune_trainer.esft.selection import ExpertConfig, select_layers
from finetune_trainer.esft.trainable import prepare

VOCAB, LENGTH, SEEDS = 128, 24, (0, 1, 2)
RATE, TARGET, MOST, CHECK = 3e-3, 1.0, 300, 5
DOMAINS = {"A": (0, 64, 7), "B": (64, 128, 5), "changed A": (0, 64, 11)}
"""First token, end, and the step from each token to the next."""


def main() -> None:
    """Each seed's rise of B's loss, and the ratio of the means."""
    rises: dict[str, list[float]] = {"full": [], "esft": []}
    for seed in SEEDS:
        base = pretrained(seed)
        before = loss(base, "B", seed)
        for method, found in rises.items():
            model, steps, reached, share = tuned(base, method, seed)
            rise = loss(model, "B", seed) - before
            found.append(rise)
            print(
                f"seed {seed} {method:4}: {steps} steps to loss {reached:.3f} on the changed A, {share:.1%} trained; "
                f"loss on B {before:.4f} + {rise:.4f}"
            )
    means = {method: statistics.mean(found) for method, found in rises.items()}
    ratio = means["esft"] / means["full"]
    print(f"mean rise on B: full {means['full']:.4f}, ESFT {means['esft']:.4f}: {ratio:.2f} of it")


def pretrained(seed: int) -> Any:
    """A model that knows A and B."""
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


def tuned(base: Any, method: str, seed: int) -> tuple[Any, int, float, float]:
    """The model after training on the changed A, its steps, the loss it reached and the share of trained weights."""
    model = copy.deepcopy(base)
    total = sum(weight.numel() for weight in model.parameters())
    if method == "esft":
        sample = rows("changed A", 64, seed + 77)
        scores = measure_scores(model, [{"input_ids": sample, "attention_mask": torch.ones_like(sample)}])
        prepare(model, ExpertConfig(select_layers(scores.token, 0.6)))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    steps, reached = 0, loss(model, "changed A", seed)
    while reached > TARGET and steps < MOST:
        for _ in range(CHECK):
            _step(model, optimizer, rows("changed A", 16, 500_000 + seed * 10_000 + steps))
            steps += 1
        reached = loss(model, "changed A", seed)
    return model, steps, reached, sum(weight.numel() for weight in trained) / total


def _step(model: Any, optimizer: torch.optim.AdamW, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@torch.no_grad()
def loss(model: Any, name: str, seed: int) -> float:
    """On 64 held-out rows of a domain."""
    ids = rows(name, 64, 900_000 + seed)
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def rows(name: str, count: int, seed: int) -> torch.Tensor:
    """Rows [count, 24] that walk through a domain's tokens; one token in ten is random."""
    first, end, step = DOMAINS[name]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, end - first, (count, 1), generator=generator)
    walk = (start + step * torch.arange(LENGTH)) % (end - first)
    noise = torch.randint(0, end - first, walk.shape, generator=generator)
    return first + torch.where(torch.rand(walk.shape, generator=generator) < 0.1, noise, walk)


if __name__ == "__main__":
    main()
