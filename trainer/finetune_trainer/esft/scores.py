"""How much a task's data uses each expert: token and gate scores of ESFT (arXiv 2407.01906, section 3.2)."""

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
    """Scores by layer, one per expert, rounded; every row of `token` sums to 1 but for that."""

    token: Mapping[int, list[float]]
    """Share of the layer's routed tokens: (times the expert is in the top K) / (K · tokens)."""
    gate: Mapping[int, list[float]]
    """Mean over the tokens of the expert's raw routing weight, 0 where it is not in the top K."""
    tokens: int
    """Tokens they were measured on, padding left out."""

    def of(self, score: str) -> Mapping[int, list[float]]:
        """The `token` or the `gate` scores."""
        return self.token if score == "token" else self.gate

    def to_json(self) -> dict[str, Any]:
        """In the form of the reference code's `summary.json`."""
        kinds = {"token_scores": self.token, "gate_scores": self.gate}
        return {name: {str(layer): _by_name(row) for layer, row in rows.items()} for name, rows in kinds.items()} | {
            "tokens": self.tokens
        }


def measure_scores(model: PreTrainedModel, batches: Iterable[Batch]) -> ExpertScores:
    """Run the model over this worker's batches and pool the counts of all workers, so that each gets the same scores.

    Prompt tokens count, padding does not.

    Args:
        model: in any mode; it is left in the mode it was in. A ZeRO-3 model must gather its weights by itself.
        batches: `input_ids` and `attention_mask`, each [B, T].
    """
    was_training = model.training
    model.eval()
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
    pooled = {layer: _pooled(counts.as_tensor()) for layer, counts in counter.layers.items()}
    token, gate, tokens = {}, {}, 0
    for layer, (counts, gates, seen) in pooled.items():
        tokens = int(seen[0])
        token[layer] = _rounded(counts / counts.sum().clamp(min=1))
        gate[layer] = _rounded(gates / max(tokens, 1))
    return ExpertScores(token, gate, tokens)


def _pooled(values: Tensor) -> Tensor:
    """The sum over the workers; counts are whole numbers, so it is exact below 2^53 in any order."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values.cpu()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]


def _by_name(row: list[float]) -> dict[str, float]:
    return {str(expert): value for expert, value in enumerate(row)}
