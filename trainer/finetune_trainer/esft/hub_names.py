"""Convert expert weights to and from their names on the hub, one expert at a time.

transformers stacks a checkpoint's per-expert tensors when it loads them and splits the stacks when it saves. To find
where each element of an expert's rows goes, its own reverse conversion runs once per layer on positions instead of
weights. This works for any family's names and layouts, and makes saving and loading exact inverses. For families that
are stacked on the hub too (gpt-oss, Granite), the name is the stack's name in the model with the expert's id inserted.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finetune_trainer.esft.families import ExpertLayer, expert_layers

_FIRST, _ANY = ".experts.0.", ".experts.{}."

Rows = dict[str, Tensor]
"""One expert's row of each stack, by the stack's name."""


@dataclass(frozen=True)
class Entry:
    """One tensor of an expert on the hub."""

    name: str
    """Its name, with `{}` for the expert's id."""
    positions: Tensor | slice
    """Positions of its elements in the expert's rows, flattened and joined."""
    shape: torch.Size


class HubNames:
    """The names of a model's experts on the hub.

    Args:
        model: a model of the same structure is built on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        with torch.device("meta"):
            # A model without a checkpoint, so that the names are the family's and not those of a checkpoint.
            self.model = type(model)(deepcopy(model.config))
        self.layers = {layer.index: layer for layer in expert_layers(self.model)}
        self._entries: dict[int, list[Entry]] = {}

    def from_rows(self, layer: int, expert: int, rows: Rows) -> dict[str, Tensor]:
        """Return one expert's tensors by hub name."""
        flat = torch.cat([rows[name].reshape(-1) for name in self.layers[layer].stacks])
        return {
            entry.name.format(expert): flat[entry.positions].reshape(entry.shape).contiguous()
            for entry in self._entries_of(layer)
        }

    def to_rows(self, layer: int, expert: int, tensors: dict[str, Tensor]) -> Rows:
        """Return one expert's rows from its tensors by hub name; the inverse of `from_rows`.

        Raises:
            KeyError: a tensor is missing.
        """
        shapes = {name: self._row_shape(layer, name) for name in self.layers[layer].stacks}
        found = {entry.name: tensors[entry.name.format(expert)] for entry in self._entries_of(layer)}
        dtype = next(iter(found.values())).dtype
        flat = torch.empty(sum(shape.numel() for shape in shapes.values()), dtype=dtype)
        for entry in self._entries_of(layer):
            flat[entry.positions] = found[entry.name].reshape(-1)
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _entries_of(self, layer: int) -> list[Entry]:
        if layer not in self._entries:
            self._entries[layer] = _entries(self.model, self.layers[layer])
        return self._entries[layer]

    def _row_shape(self, layer: int, stack: str) -> torch.Size:
        shape: torch.Size = getattr(self.layers[layer].experts, stack).shape
        return shape[1:]


def _entries(model: PreTrainedModel, layer: ExpertLayer) -> list[Entry]:
    """Return an expert's tensors on the hub, found by converting a stack of one expert whose values are positions."""
    start, stacks = 0, {}
    for name in layer.stacks:
        shape = getattr(layer.experts, name).shape[1:]
        stacks[f"{layer.name}.{name}"] = torch.arange(start, start + shape.numel()).reshape(1, *shape)
        start += shape.numel()
    apart = revert_weight_conversion(model, dict(stacks))
    if all(_FIRST in name for name in apart):
        return [_entry(name.replace(_FIRST, _ANY), tensor, tensor.shape) for name, tensor in apart.items()]
    return [
        _entry(f"{layer.name}.{{}}.{name.rpartition('.')[2]}", tensor, tensor.shape[1:])
        for name, tensor in stacks.items()
    ]


def _entry(name: str, positions: Tensor, shape: torch.Size) -> Entry:
    flat = positions.reshape(-1)
    first, last = int(flat[0]), int(flat[-1])
    in_order = torch.equal(flat, torch.arange(first, first + len(flat)))
    return Entry(name, slice(first, last + 1) if in_order else flat, shape)
