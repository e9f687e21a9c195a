"""Evaluation metrics that do not depend on batch size, world size or packing.

transformers averages the means of batches, so a batch of few tokens weighs as much as one of many. Here each batch
yields sums and their denominators (tokens or pairs); both are added over all batches and workers, and divided once.
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
"""For each metric the sum over the tokens or pairs of a batch, and their number."""


class HeldOutLoader(DataLoader[Any]):
    """A data loader of a worker's held-out rows. Every worker has the same number of batches, as ZeRO-3 needs.

    Args:
        rows: the dataset.
        batches: positions in `rows` of each batch.
        counts: whether each batch counts; a worker without rows left repeats a row in batches that do not count.
        collate: the collator.
        options: options of the data loader.
    """

    def __init__(self, rows: Any, batches: list[list[int]], counts: list[bool], collate: Any, **options: Any) -> None:
        super().__init__(rows, batch_sampler=batches, collate_fn=collate, **options)
        self.counts = counts


def share(rows: int, batch_size: int, workers: int, rank: int) -> tuple[list[list[int]], list[bool]]:
    """Return the batches of one worker, and whether each batch counts. Each row is on exactly one worker."""
    first, last = rank * rows // workers, (rank + 1) * rows // workers
    own = [list(range(at, min(at + batch_size, last))) for at in range(first, last, batch_size)]
    idle = math.ceil(math.ceil(rows / workers) / batch_size) - len(own)
    return own + [[0]] * idle, [True] * len(own) + [False] * idle


class Means:
    """The sums of an evaluation. They stay on the device until the end.

    Args:
        counts: whether each batch counts, in order. None: all count.
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

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Return the means over the batches of all workers. Every worker calls it and gets the same means.

        Metrics whose denominator is 0 are omitted.
        """
        if not self._sums:
            return {}
        table = accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum").tolist()
        return {name: total / number for name, (total, number) in zip(self._sums, table, strict=True) if number}


def token_sums(model: Any, inputs: dict[str, Any]) -> Sums:
    """Return negative log-likelihood in nats, entropy and top-1 accuracy of the next token, by TRL's fused head.

    The load-balancing loss of a mixture of experts is not included: it is a statistic of a whole batch and depends on
    the batch size, and runs are compared by their likelihood.
    """
    output = model(**inputs, use_cache=False, fused_lm_head=True)
    tokens = output.label_mask.sum()
    return {
        "loss": (-output.log_probs.sum(dtype=torch.float64), tokens),
        "entropy": (output.entropy.sum(dtype=torch.float64), tokens),
        "mean_token_accuracy": (output.is_top1.sum(), tokens),
    }


def masked_sums(model: Any, inputs: dict[str, Any]) -> Sums:
    """Return the negative log-likelihood in nats of the masked tokens, by a masked language model."""
    labels = inputs["labels"].flatten()
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    masked = labels != IGNORED
    losses = functional.cross_entropy(logits.flatten(0, 1)[masked].float(), labels[masked], reduction="sum")
    return {"loss": (losses, masked.sum())}


def reward_sums(loss: Tensor, rewards: Tensor) -> Sums:
    """Return the sums of a reward model's metrics.

    Args:
        loss: mean over the pairs of a batch.
        rewards: of the chosen and the rejected answers [pairs, 2].
    """
    pairs, margins = len(rewards), rewards[:, 0] - rewards[:, 1]
    return {
        "loss": (loss * pairs, pairs),
        "accuracy": ((margins > 0).sum(), pairs),
        "margin": (margins.sum(), pairs),
        "mean_reward": (rewards.sum(), 2 * pairs),
    }


def preference_sums(loss: Tensor, means: Mapping[str, float], mask: Tensor, sft_weight: float) -> Sums:
    """Return the metrics of TRL's DPOTrainer on a batch as sums.

    TRL's metrics are means over pairs, or over the tokens of one side or of both. The part of the loss that `loss_type`
    sft adds is a mean over the tokens of chosen answers, the rest is a mean over pairs; `preference_loss` adds the two
    after each is averaged over all batches.

    Args:
        loss: loss of the batch.
        means: TRL's metrics by name.
        mask: `completion_mask` [2B, L], the chosen answers first.
        sft_weight: weight of the loss type sft; 0 if it is not used.
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
    """Return the means with the two parts of the loss added."""
    rest = {name: value for name, value in means.items() if name != SFT_LOSS}
    return rest | {"loss": rest["loss"] + means.get(SFT_LOSS, 0.0)}


@contextmanager
def without_gathering(trainer: Any) -> Iterator[None]:
    """Make the trainer compute metrics of this worker's batch only, without communication. A context manager."""
    accelerator = trainer.accelerator
    trainer.accelerator = _LocalAccelerator(accelerator)
    try:
        yield
    finally:
        trainer.accelerator = accelerator


class _LocalAccelerator:
    """An accelerator that does not gather."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensor: Any) -> Any:
        """Return the tensor unchanged."""
        return tensor

    gather_for_metrics = gather
