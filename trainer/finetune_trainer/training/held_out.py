"""Means over held-out rows that no batch size, number of workers or packing changes.

transformers averages the means of batches, so a batch of few tokens weighs as much as one of many. Here each batch
gives sums and what they are to be divided by (tokens or pairs); both are added up over all batches and workers, and
divided once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from finetune_trainer.data.encode import IGNORED

SFT_LOSS = "sft_loss"
Sums = Mapping[str, tuple[Tensor | float, Tensor | float]]
"""By metric: a sum over the tokens or pairs of a batch, and their number."""


class HeldOutLoader(DataLoader[Any]):
    """A worker's batches of held-out rows. Every worker has the same number of batches, as ZeRO-3 needs it.

    Args:
        batches: positions in `rows` of each batch.
        counts: whether a batch is part of the measure; a worker that has run out of rows repeats one that is not.
    """

    def __init__(self, rows: Any, batches: list[list[int]], counts: list[bool], collate: Any, **options: Any) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=collate, **options)  # type: ignore[arg-type]
        self.counts = counts


def share(rows: int, batch_size: int, workers: int, rank: int) -> tuple[list[list[int]], list[bool]]:
    """One worker's batches of `rows` rows, each row on exactly one worker, and whether each batch counts."""
    first, last = rank * rows // workers, (rank + 1) * rows // workers
    mine = [list(range(at, min(at + batch_size, last))) for at in range(first, last, batch_size)]
    idle = math.ceil(math.ceil(rows / workers) / batch_size) - len(mine)
    return mine + [[0]] * idle, [True] * len(mine) + [False] * idle


class Means:
    """Sums so far. Nothing leaves the device before the end.

    Args:
        counts: whether each batch to come is part of the measure; all are where it is None.
    """

    def __init__(self, counts: list[bool] | None = None) -> None:
        self._counts = None if counts is None else iter(counts)
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Sums, device: torch.device) -> None:
        """Add a batch's sums, float64."""
        counted = self._counts is None or next(self._counts)
        for name, pair in sums.items():
            new = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=device) for one in pair])
            known = self._sums.get(name, torch.zeros_like(new))
            self._sums[name] = known + new if counted else known

    def over_all(self, accelerator: Any) -> dict[str, float]:
        """The means over all workers' batches; every worker calls it and gets the same. A mean of nothing is left
        out."""
        if not self._sums:
            return {}
        table = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        return {name: total / number for name, (total, number) in zip(self._sums, table, strict=True) if number}


def token_sums(model: Any, inputs: dict[str, Any]) -> Sums:
    """Negative log-likelihood in nats, entropy and top-1 accuracy of the next token, by a model with TRL's fused head.

    A mixture of experts' balance loss is no part of it: it is a statistic of a whole batch, so it changes with the
    batch size, and the likelihood is what different runs are compared by.
    """
    output = model(**inputs, use_cache=False, fused_lm_head=True)
    tokens = output.label_mask.sum()
    return {
        "loss": (-output.log_probs.sum(dtype=torch.float64), tokens),
        "entropy": (output.entropy.sum(dtype=torch.float64), tokens),
        "mean_token_accuracy": (output.is_top1.sum(), tokens),
    }


def masked_sums(model: Any, inputs: dict[str, Any]) -> Sums:
    """Negative log-likelihood in nats of what is hidden, by a masked language model."""
    labels = inputs["labels"].flatten()
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    hidden = labels != IGNORED
    losses = functional.cross_entropy(logits.flatten(0, 1)[hidden].float(), labels[hidden], reduction="sum")
    return {"loss": (losses, hidden.sum())}


def reward_sums(loss: Tensor, rewards: Tensor) -> Sums:
    """What a reward model's mean loss over pairs and its rewards [pairs, 2] of chosen and rejected come to."""
    pairs, margins = len(rewards), rewards[:, 0] - rewards[:, 1]
    return {
        "loss": (loss * pairs, pairs),
        "accuracy": ((margins > 0).sum(), pairs),
        "margin": (margins.sum(), pairs),
        "mean_reward": (rewards.sum(), 2 * pairs),
    }


def preference_sums(loss: Tensor, means: Mapping[str, float], mask: Tensor, sft_weight: float) -> Sums:
    """What TRL's DPOTrainer measures on a batch, as sums.

    Its metrics are means over pairs, or over the tokens of one side or of both. Of the loss, what `loss_type` sft adds
    is a mean over the chosen answers' tokens, all else is one over pairs; the two are added after each is averaged over
    all batches, by `preference_loss`.

    Args:
        loss: of the batch.
        means: TRL's metrics by name.
        mask: `completion_mask` [2B, L], the chosen answers first.
        sft_weight: weight of the loss type sft; 0 where it is not used.
    """
    chosen, rejected = (side.sum() for side in mask[:, 1:].chunk(2))
    pairs = len(mask) // 2
    weights = {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "logits/chosen": chosen}
    weights["logits/rejected"] = rejected
    sums: dict[str, tuple[Tensor | float, Tensor | float]] = {
        name: (value * weights.get(name, pairs), weights.get(name, pairs)) for name, value in means.items()
    }
    if not sft_weight:
        return sums | {"loss": (loss * pairs, pairs)}
    likelihood = -sft_weight * pairs * means["logps/chosen"]
    return sums | {"loss": ((loss - likelihood / chosen) * pairs, pairs), SFT_LOSS: (likelihood, chosen)}


def preference_loss(means: dict[str, float]) -> dict[str, float]:
    """The means with the two parts of the loss as one."""
    rest = {name: value for name, value in means.items() if name != SFT_LOSS}
    return rest | {"loss": rest["loss"] + means.get(SFT_LOSS, 0.0)}


@contextmanager
def alone(trainer: Any) -> Iterator[None]:
    """Inside, what the trainer gathers from all workers is its own share: TRL's metrics are this worker's, and need no
    communication."""
    accelerator = trainer.accelerator
    trainer.accelerator = _Alone(accelerator)
    try:
        yield
    finally:
        trainer.accelerator = accelerator


class _Alone:
    """An accelerator that gathers nothing."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        """The tensor as it is."""
        return tensor

    gather_for_metrics = gather
