"""Read the tensors of a saved model one at a time, under their names in its files.

The model itself is on the meta device, so that a merge needs the memory of one file of the result and not of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from finetune_trainer.esft.adapter_files import ADAPTER_WEIGHTS
from finetune_trainer.model.vocabulary import resize_embeddings
from finetune_trainer.model.weights import TensorFile, tensor_files

Tensors = dict[str, Tensor]
_MAPPED = 1 << 20
"""Bytes read before a file is mapped again: pages of a mapped file count as memory of the process."""


class Reader:
    """A reader of single tensors in safetensors files that limits how much of a file stays mapped in memory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._read = 0

    def read(self, source: TensorFile, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor in that dtype, on the CPU."""
        if self._path != source.path or self._read > _MAPPED:
            self._path, self._file, self._read = source.path, safe_open(source.path, framework="pt"), 0
        found: Tensor = self._file.get_tensor(source.name)
        self._read += found.nbytes
        return found.to(dtype, copy=True)


@dataclass(frozen=True)
class SavedBase:
    """A saved model that is read tensor by tensor.

    `names_in_files` and all keys are the names that `save_pretrained` writes, which may differ from the model's own:
    transformers stacks, splits and renames tensors as it loads them.
    """

    model: PreTrainedModel
    """On the meta device, except for resized embeddings."""
    files: Mapping[str, TensorFile]
    """The location of each tensor in the base's files."""
    held: Mapping[str, Tensor] = field(default_factory=dict)
    """Values that replace those in the files: resized embeddings, and weights from an adapter's file."""

    @cached_property
    def written(self) -> Tensors:
        """Return the tensors that `save_pretrained` writes, on the meta device."""
        ignored = set(self.model._keys_to_ignore_on_save or ())
        state = {name: one for name, one in self.model.state_dict().items() if name not in ignored}
        state = remove_tied_weights_from_state_dict(_on_meta(state), self.model)
        return _on_meta(revert_weight_conversion(self.model, state))

    def lacking(self, written: Mapping[str, Tensor], provided: Iterable[str] = ()) -> list[str]:
        """Return the names of the result's tensors whose values are not available.

        Args:
            provided: names of tensors that an adapter replaces.
        """
        known = {*provided, *self.held}
        return [name for name, one in written.items() if name not in known and not self._is_in_files(name, one)]

    def value(self, name: str, dtype: torch.dtype, reader: Reader) -> Tensor:
        """Return a copy of a tensor's value in that dtype."""
        if name in self.held:
            return self.held[name].to(dtype, copy=True)
        return reader.read(self.files[name], dtype)

    def overlaid(self, adapter: Path) -> SavedBase | None:
        """Return the base with the tensors of an expert adapter; None where the base names its tensors differently."""
        found = tensor_files([adapter / ADAPTER_WEIGHTS])
        written = self.written
        if not all(name in written and written[name].shape == one.shape for name, one in found.items()):
            return None
        return replace(self, files={**self.files, **found})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SavedBase | None:
        """Return the base with some tensors replaced; None where it has no tensors of these names and shapes."""
        written = self.written
        if not all(name in written and written[name].shape == one.shape for name, one in tensors.items()):
            return None
        return replace(self, held={**self.held, **tensors})

    def resized(self, rows: int) -> SavedBase | None:
        """Return the base with `rows` rows in its embeddings; None where the files name the embeddings differently."""
        own = {id(one): name for name, one in self.model.named_parameters()}
        tables = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]  # type: ignore[no-untyped-call]
        for table in tables:
            name = own.get(id(table.weight)) if table is not None else None
            if name is None or table.weight.device.type != "meta":
                continue  # the head is tied to the embedding
            if name not in self.files:
                return None
            table.weight = nn.Parameter(Reader().read(self.files[name], table.weight.dtype), requires_grad=False)
            self.model.tie_weights()
        resize_embeddings(self.model, rows)
        real = {name: one.detach() for name, one in self.model.named_parameters() if one.device.type != "meta"}
        return replace(self, held={**self.held, **real}) if real.keys() <= self.written.keys() else None

    def groups(self, names: Iterable[str]) -> dict[str, str]:
        """Return the group of each weight of the model; one conversion writes the weights of one group.

        A weight that is only renamed forms a group whose name is the weight's.
        """
        conversions = getattr(self.model, "_weight_conversions", None) or []
        reverse: Any = [one.reverse_transform() for one in reversed(conversions) if isinstance(one, WeightConverter)]
        found = {}
        for name in names:
            group, pattern = apply_converters(name, reverse)
            found[name] = name if pattern is None else group
        return found

    def reverted(self, values: Tensors) -> Tensors:
        """Return a group's values under the names and in the shapes of the files."""
        found: Tensors = revert_weight_conversion(self.model, values)
        return found

    def _is_in_files(self, name: str, one: Tensor) -> bool:
        return name in self.files and self.files[name].shape == one.shape


def _on_meta(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors of the same shapes and dtypes on the meta device."""
    return {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}
