"""The trained weights of an adapted model, and nothing of its base, on the CPU of the first worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from finetune_trainer.esft.zero3 import gathered
from finetune_trainer.model.adapter import NAME

_SAVED = f".modules_to_save.{NAME}."


def trained_weights(model: Any, *, keep: bool, embeddings: bool = False) -> dict[str, Tensor]:
    """Return the weights that PEFT saves with an adapter, by their names in the adapted model.

    ZeRO-3 divides every weight among the workers. Only these are put together, one at a time, so that saving an adapter
    takes neither the traffic nor the memory of the base. Every worker calls it.

    Args:
        model: PEFT's, not wrapped.
        keep: False on the workers that only take part in the gathering; they get nothing.
        embeddings: whether the base's embeddings are saved too, because they got more rows.
    """
    found: dict[str, Tensor] = {}
    tables = _tables(model) if embeddings else set()
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not (weight.requires_grad or name in tables):
            continue
        with gathered([weight]):
            if keep:
                found[name] = weight.detach().to("cpu", copy=True)
    if keep:
        found |= {name: one.detach().cpu() for name, one in model.named_buffers() if _SAVED in name}
    return found


def _tables(model: Any) -> set[str]:
    """Return the names of the base's input and output embeddings."""
    return set(_weights_of(model, model.get_input_embeddings(), model.get_output_embeddings()))


def _weights_of(model: Any, *modules: Any) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is one for one in modules):
            yield from (f"{name}.{own}" for own, _ in module.named_parameters())
