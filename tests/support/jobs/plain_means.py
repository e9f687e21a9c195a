"""Expected evaluation metrics with plain transformers: one row at a time, each token or pair counted once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

Row = dict[str, Any]


@torch.no_grad()
def token_means(model: Any, rows: Iterable[Row]) -> dict[str, float]:
    """Return the loss, entropy and accuracy over all labelled tokens of prepared rows."""
    sums = torch.zeros(4, dtype=torch.float64)
    for row in rows:
        logits, wanted = scored(model, row)
        scores = logits.log_softmax(-1)
        loss, right = functional.nll_loss(scores, wanted, reduction="sum"), (logits.argmax(-1) == wanted).sum()
        sums += torch.stack([loss, -(scores.exp() * scores).sum(), right, torch.tensor(float(len(wanted)))])
    loss, entropy, accuracy = (sums[:3] / sums[3]).tolist()
    return {"eval_loss": loss, "eval_entropy": entropy, "eval_mean_token_accuracy": accuracy}


@torch.no_grad()
def scored(model: Any, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [n, vocabulary] and labels [n] of a row's labelled tokens."""
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])[1:]
    return model(ids[None]).logits[0, :-1][labels != -100], labels[labels != -100]


def pair_means(rewards: torch.Tensor) -> dict[str, float]:
    """Return the metrics of a reward stage from rewards [pairs, 2] of chosen and rejected answers."""
    margins = rewards[:, 0] - rewards[:, 1]
    loss = -functional.logsigmoid(margins)
    parts = {"loss": loss, "accuracy": (margins > 0).float(), "margin": margins, "mean_reward": rewards}
    return {f"eval_{name}": part.mean().item() for name, part in parts.items()}
