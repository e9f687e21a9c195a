"""Measures how evenly the experts of a mixture-of-experts model are used in training."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.esft.families import routers
from finetune_trainer.esft.load_report import load_metrics
from finetune_trainer.esft.routing import RoutingCounter
from finetune_trainer.training.collectives import Collectives


def watch_routing(model: Any) -> RoutingCounter | None:
    """Count the experts that a model's routers choose in training mode from now on; None for a dense model."""
    return RoutingCounter(model, training=True).attach() if routers(model) else None


def expert_loads(counter: RoutingCounter, collectives: Collectives) -> dict[str, float]:
    """Return load metrics of all workers since the last call. Every worker calls it."""
    own = counter.take_counts()
    if not own:
        return {}
    layers, counts = sorted(own), torch.stack([own[layer] for layer in sorted(own)]).cpu()
    pooled = torch.tensor(collectives.sum(counts.flatten().tolist())).reshape(counts.shape)
    return load_metrics(dict(zip(layers, pooled.tolist(), strict=True)))
