"""How evenly experts are used, and what a run's report shows of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.esft.scores import ExpertScores
from finetune_trainer.esft.selection import ExpertConfig


def entropy(shares: Sequence[float]) -> float:
    """Entropy of a layer's load over that of even load: 1 where every expert gets the same, 0 where one gets all."""
    total = sum(shares)
    if total <= 0 or len(shares) < 2:
        return 1.0
    parts = [share / total for share in shares if share > 0]
    return -sum(part * math.log(part) for part in parts) / math.log(len(shares))


def peak(shares: Sequence[float]) -> float:
    """The busiest expert's load over the mean load: 1 where load is even."""
    total = sum(shares)
    return max(shares) * len(shares) / total if total > 0 else 1.0


def balance(loads: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Entropy by layer and its mean."""
    layers = {str(layer): entropy(shares) for layer, shares in loads.items()}
    return {"layers": layers, "mean": sum(layers.values()) / max(len(layers), 1)}


def load_metrics(loads: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """For the metrics log: mean entropy, the highest peak, and the share of experts without load."""
    if not loads:
        return {}
    unused = sum(share == 0 for shares in loads.values() for share in shares)
    return {
        "expert_load_entropy": balance(loads)["mean"],
        "expert_load_peak": max(map(peak, loads.values())),
        "expert_load_unused": unused / sum(map(len, loads.values())),
    }


def load_report(scores: ExpertScores, config: ExpertConfig) -> dict[str, Any]:
    """Scores, the chosen experts and the balance, as JSON values."""
    selected = {str(layer): list(ids) for layer, ids in config.experts.items()}
    return scores.to_json() | {"selected": selected, "balance": balance(scores.token)}
