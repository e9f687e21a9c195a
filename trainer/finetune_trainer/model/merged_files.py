"""Merge an adapter into a saved model and write the result one file at a time.

Memory use is the tensors of one file of the result and one weight in float32, independent of the model's size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from finetune_trainer.errors import UserError
from finetune_trainer.model.adapter_changes import Changes, adapter_changes
from finetune_trainer.model.saved_base import Reader, SavedBase, Tensors
from finetune_trainer.model.weights import SHARD_SIZE

_ALIGNED = 64
_PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class MergePlan:
    """A merge that is possible tensor by tensor."""

    base: SavedBase
    written: Tensors
    """Tensors of the result, on the meta device."""
    changes: Changes = field(default_factory=Changes)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The weights of each group, where the adapter changes any of them. One conversion writes one group."""
    group_of: Mapping[str, str] = field(default_factory=dict)
    """The group of each tensor of the result."""

    def write(self, directory: Path, shard_size: str | int = SHARD_SIZE) -> None:
        """Write the result's weights, configuration and generation configuration, as `save_pretrained` does.

        Raises:
            UserError: a merged weight is not finite.
        """
        directory.mkdir(parents=True, exist_ok=True)
        split = split_torch_state_dict_into_shards(self.written, filename_pattern=_PATTERN, max_shard_size=shard_size)
        values, buffer = _MergedValues(self), _FileBuffer(self.written, split.filename_to_tensors.values())
        for file, names in split.filename_to_tensors.items():
            tensors = buffer.tensors(names)
            for name, target in tensors.items():
                target.copy_(values.take(name))
            save_file(tensors, directory / file, metadata={"format": "pt"})
        if split.is_sharded:
            count = {"total_parameters": self.base.model.num_parameters()}
            index = {"metadata": count | split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")
        self._write_configs(directory)

    def _write_configs(self, directory: Path) -> None:
        model: Any = self.base.model
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)


def plan_merge(base: SavedBase, adapter: str | Path | None = None) -> MergePlan | None:
    """Return the plan for merging a base with an adapter tensor by tensor, or None where that is not possible.

    It is impossible where no file of the base has a tensor of the result (other names, other shapes), or where the
    change of a weight can't be computed for that weight alone (see `adapter_changes`).

    Raises:
        UserError: the adapter lacks weights or does not fit the model.
    """
    written = base.written
    if adapter is None:
        return None if base.lacking(written) else MergePlan(base, written)
    changes = adapter_changes(deepcopy(base.model), adapter)
    updated_base = None if changes is None else _with_base_weights(base, changes)
    if changes is None or updated_base is None:
        return None
    base = updated_base
    groups = _groups(base, changes)
    group_of: dict[str, str] = {}
    provided: set[str] = set()
    for group, weights in groups.items():
        kinds = {_kind(changes, weight) for weight in weights}
        outputs = base.reverted({weight: _shape_of(base, changes, weight) for weight in weights})
        converted = len(outputs) > 1 or group not in weights
        if ("whole" in kinds and len(kinds) > 1) or ("scaled" in kinds and converted):
            return None
        group_of |= dict.fromkeys(outputs, group)
        provided |= set(outputs) if kinds == {"whole"} else set()
    if base.lacking(written, provided):
        return None
    return MergePlan(base, written, changes, groups, group_of)


def _with_base_weights(base: SavedBase, changes: Changes) -> SavedBase | None:
    """Return the base with its own weights that an adapter's file holds.

    None where a conversion joins such a weight with another one.
    """
    groups = base.groups(base.model.state_dict())
    alone = {name: one for name, one in changes.base.items() if list(groups.values()).count(groups[name]) == 1}
    written = base.written
    tensors = {name: one for name, one in base.reverted(dict(alone)).items() if name in written}
    return base.with_tensors(tensors) if len(alone) == len(changes.base) else None


def _groups(base: SavedBase, changes: Changes) -> dict[str, tuple[str, ...]]:
    names = {*base.model.state_dict(), *changes.names()}
    members: dict[str, list[str]] = {}
    for name, group in base.groups(sorted(names)).items():
        members.setdefault(group, []).append(name)
    touched = changes.names()
    return {group: tuple(weights) for group, weights in members.items() if touched & set(weights)}


def _kind(changes: Changes, weight: str) -> str:
    if weight in changes.whole:
        return "whole"
    return "scaled" if weight in changes.scaled else "sum"


def _shape_of(base: SavedBase, changes: Changes, weight: str) -> Tensor:
    one = changes.whole.get(weight)
    shape = base.model.get_parameter_or_buffer(weight).shape if one is None else one.shape
    return torch.empty(shape, device="meta")


class _FileBuffer:
    """Memory for the tensors of one file, reused for each file.

    With separate allocations, the float32 sums between them would fragment the allocator's memory.
    """

    def __init__(self, written: Tensors, files: Iterable[list[str]]) -> None:
        self.written = written
        sizes = [sum(self._size(name) for name in names) for names in files]
        self.memory = torch.empty(max(sizes, default=0), dtype=torch.uint8)

    def tensors(self, names: list[str]) -> Tensors:
        """Return uninitialized tensors, which do not overlap, for the names in one file."""
        found, start = {}, 0
        for name in names:
            one = self.written[name]
            found[name] = self.memory[start : start + one.nbytes].view(one.dtype).view(one.shape)
            start += self._size(name)
        return found

    def _size(self, name: str) -> int:
        """Return a tensor's size in bytes, padded so that the next tensor is aligned."""
        return -(-self.written[name].nbytes // _ALIGNED) * _ALIGNED


class _MergedValues:
    """The result's tensors, one at a time. The other outputs of a conversion are kept until they are taken."""

    def __init__(self, plan: MergePlan) -> None:
        self.plan, self.reader = plan, Reader()
        self.pending: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """Return a tensor of the result; call this once per name."""
        plan, dtype = self.plan, self.plan.written[name].dtype
        group = plan.group_of.get(name)
        if group is None:
            return plan.base.value(name, dtype, self.reader)
        if plan.groups[group][0] in plan.changes.scaled:
            merged = plan.changes.scaled[plan.groups[group][0]](self._float(name))
        else:
            if name not in self.pending:
                self.pending |= self._group_changes(group)
            merged = self.pending.pop(name)
            if plan.groups[group][0] not in plan.changes.whole:
                merged = self._float(name).add_(merged)
        return _require_finite(name, merged.to(dtype))

    def _float(self, name: str) -> Tensor:
        """Return the base's value in float32, after rounding it to the result's dtype, as loading does."""
        value = self.plan.base.value(name, self.plan.written[name].dtype, self.reader)
        return value.float()

    def _group_changes(self, group: str) -> Tensors:
        """Return a group's updates, or its weights where they were trained in full, by the result's names."""
        base, changes = self.plan.base, self.plan.changes
        values = {}
        for weight in self.plan.groups[group]:
            if weight in changes.whole:
                values[weight] = changes.whole[weight]
            elif weight in changes.sums:
                values[weight] = changes.sums[weight]()
            else:
                values[weight] = torch.zeros(_shape_of(base, changes, weight).shape)
        found = base.reverted(values)
        return {name: one for name, one in found.items() if name in self.plan.written}


def _require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor if it is finite.

    Raises:
        UserError: it holds NaN or an infinity.
    """
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"the merged weight {name} is not finite in {str(tensor.dtype).removeprefix('torch.')}: training has "
            "diverged or left the range of that dtype; lower the learning rate, or set lora.merge to false and "
            "look at the adapter"
        )
    return tensor
