"""Collects the trained weights of an adapted model, without those of its base, on the CPU of rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from finetune_trainer.esft.zero3 import gathered
from finetune_trainer.model.adapter import NAME

_SAVED = f".modules_to_save.{NAME}."


def trained_weights(model: Any, *, keep: bool, embeddings: bool = False) -> dict[str, Tensor]:
    """Return the weights that PEFT saves with an adapter, by their names in the adapted model.

    ZeRO-3 shards every weight. Only the weights of the adapter are gathered, one at a time, so that saving an adapter
    needs neither the traffic nor the memory of the base. Every worker calls it.

    Args:
        model: the PEFT model, not wrapped.
        keep: whether to return the weights; False on workers that only take part in the gathering.
        embeddings: whether to return the base's embeddings too, because their vocabulary has grown.
    """
    weights: dict[str, Tensor] = {}
    tables = _tables(model) if embeddings else set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not (weight.requires_grad or name in tables):
            continue
        with gathered([weight]):
            if keep:
                weights[name] = weight.detach().to("cpu", copy=True)
    if keep:
        weights |= {name: one.detach().cpu() for name, one in model.named_buffers() if _SAVED in name}
    return weights


def _tables(model: Any) -> set[str]:
    """Return the names of the base's input and output embeddings."""
    return set(_weights_of(model, model.get_input_embeddings(), model.get_output_embeddings()))


def _weights_of(model: Any, *modules: Any) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is one for one in modules):
            yield from (f"{name}.{own}" for own, _ in module.named_parameters())
