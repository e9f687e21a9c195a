"""Measure how evenly experts are used, for metrics and a run's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_trainer.esft.scores import ExpertScores
from finetune_trainer.esft.selection import ExpertConfig


def entropy(shares: Sequence[float]) -> float:
    """Return the normalized entropy of a layer's load: 1 for an even load, 0 if one expert gets everything."""
    total = sum(shares)
    if total <= 0 or len(shares) < 2:
        return 1.0
    parts = [share / total for share in shares if share > 0]
    return -sum(part * math.log(part) for part in parts) / math.log(len(shares))


def peak(shares: Sequence[float]) -> float:
    """Return the maximum load over the mean load: 1 for an even load."""
    total = sum(shares)
    return max(shares) * len(shares) / total if total > 0 else 1.0


def balance(loads: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """Return the entropy by layer and its mean."""
    layers = {str(layer): entropy(shares) for layer, shares in loads.items()}
    return {"layers": layers, "mean": sum(layers.values()) / max(len(layers), 1)}


def load_metrics(loads: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Return metrics of the load: mean entropy, the highest peak, and the share of experts without load."""
    if not loads:
        return {}
    unused = sum(share == 0 for shares in loads.values() for share in shares)
    return {
        "expert_load_entropy": balance(loads)["mean"],
        "expert_load_peak": max(map(peak, loads.values())),
        "expert_load_unused": unused / sum(map(len, loads.values())),
    }


def load_report(scores: ExpertScores, config: ExpertConfig) -> dict[str, Any]:
    """Return scores, selected experts and balance as JSON values."""
    selected = {str(layer): list(ids) for layer, ids in config.experts.items()}
    return scores.to_json() | {"selected": selected, "balance": balance(scores.token)}
