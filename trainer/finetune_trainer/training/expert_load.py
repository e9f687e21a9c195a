"""How evenly a model's experts are used while it trains, for the metrics of every stage of an expert model."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.esft.families import routers
from finetune_trainer.esft.load_report import load_metrics
from finetune_trainer.esft.routing import RoutingCounter
from finetune_trainer.training.collectives import Collectives


def watch_routing(model: Any) -> RoutingCounter | None:
    """Count what a model's routers choose from now on, in training mode; None for a dense model."""
    return RoutingCounter(model, training=True).attach() if routers(model) else None


def expert_loads(counter: RoutingCounter, collectives: Collectives) -> dict[str, float]:
    """Statistics of all workers' routing since the last call; every worker calls it."""
    mine = counter.take_counts()
    if not mine:
        return {}
    layers, counts = sorted(mine), torch.stack([mine[layer] for layer in sorted(mine)]).cpu()
    pooled = torch.tensor(collectives.sum(counts.flatten().tolist())).reshape(counts.shape)
    return load_metrics(dict(zip(layers, pooled.tolist(), strict=True)))
