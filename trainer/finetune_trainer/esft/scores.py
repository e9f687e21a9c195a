"""Measure how much a task's data uses each expert: token and gate scores of ESFT (arXiv 2407.01906, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from finetune_trainer.esft.routing import RoutingCounter
from finetune_trainer.esft.selection import DECIMALS

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ExpertScores:
    """Rounded scores by layer, one per expert; before rounding, each row of `token` sums to 1."""

    token: Mapping[int, list[float]]
    """Share of the layer's routed tokens: (times the expert is in the top K) / (K * tokens)."""
    gate: Mapping[int, list[float]]
    """Mean over the tokens of the expert's raw routing weight, which is 0 where it is not in the top K."""
    tokens: int
    """Number of measured tokens, without padding."""

    def of(self, score: str) -> Mapping[int, list[float]]:
        """Return the `token` or the `gate` scores."""
        return self.token if score == "token" else self.gate

    def to_json(self) -> dict[str, Any]:
        """Return the scores in the format of the reference code's `summary.json`."""
        kinds = {"token_scores": self.token, "gate_scores": self.gate}
        return {name: {str(layer): _by_name(row) for layer, row in rows.items()} for name, rows in kinds.items()} | {
            "tokens": self.tokens
        }


def measure_scores(model: PreTrainedModel, batches: Iterable[Batch]) -> ExpertScores:
    """Run the model over this worker's batches and sum the counts of all workers, so that each gets the same scores.

    Prompt tokens count, padding does not.

    Args:
        model: in any mode, which is restored. A ZeRO-3 model must gather its own weights.
        batches: `input_ids` and `attention_mask`, each [B, T].
    """
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    device = next(model.parameters()).device
    try:
        with RoutingCounter(model, gates=True) as counter, torch.no_grad():
            for batch in batches:
                placed = {name: value.to(device) for name, value in batch.items()}
                model.base_model(**placed, use_cache=False)
    finally:
        model.train(was_training)
    return _scores(counter)


def _scores(counter: RoutingCounter) -> ExpertScores:
    summed = {layer: _summed(counts.as_tensor()) for layer, counts in counter.layers.items()}
    token, gate, tokens = {}, {}, 0
    for layer, (counts, gates, seen) in summed.items():
        tokens = int(seen[0])
        token[layer] = _rounded(counts / counts.sum().clamp(min=1))
        gate[layer] = _rounded(gates / max(tokens, 1))
    return ExpertScores(token, gate, tokens)


def _summed(values: Tensor) -> Tensor:
    """Return the sum over the workers; counts are integers, so it is exact up to 2^53 in any order."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values.cpu()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]


def _by_name(row: list[float]) -> dict[str, float]:
    return {str(expert): value for expert, value in enumerate(row)}
