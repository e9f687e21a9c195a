"""Save trained experts as an expert adapter, and load such an adapter into a model.

An adapter directory holds `expert_adapter.safetensors` (hub names, one tensor per expert and projection) and
`expert_config.json` (the selected experts, and `base_model_name_or_path`). Saving and loading are exact inverses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.esft.adapter_files import ADAPTER_WEIGHTS, BASE, read_adapter_config
from finetune_trainer.esft.families import expert_layers
from finetune_trainer.esft.hub_names import HubNames
from finetune_trainer.esft.selection import ExpertConfig
from finetune_trainer.esft.split import TUNED, SplitExperts
from finetune_trainer.esft.trainable import trained_names, tuned_modules
from finetune_trainer.esft.zero3 import gathered
from finetune_trainer.layout import EXPERT_CONFIG


def trained_tensors(model: PreTrainedModel, config: ExpertConfig, dtype: torch.dtype, keep: bool) -> dict[str, Tensor]:
    """Return all trained tensors of a split model by hub name, on the CPU.

    This is a collective under ZeRO-3: every worker calls it.

    Args:
        keep: False on workers that only take part in the gathering; they get an empty dict.
    """
    names = HubNames(model)
    found: dict[str, Tensor] = {}
    for layer, experts in tuned_modules(model):
        with gathered(experts.tuned_parameters()):
            if keep:
                for row, expert in enumerate(experts.tuned_ids):
                    rows = {name: _tuned_row(experts, name, row, dtype) for name in layer.stacks}
                    found |= names.from_rows(layer.index, expert, rows)
    for name, parameter in _whole_parameters(model, config):
        with gathered([parameter]):
            if keep:
                found[_hub_name(names, name)] = parameter.detach().to("cpu", dtype).contiguous()
    return found


def write_adapter(directory: Path, tensors: dict[str, Tensor], config: ExpertConfig, base: str) -> None:
    """Write an adapter.

    Args:
        base: directory or hub id of its base model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / EXPERT_CONFIG).write_text(json.dumps(config.to_json() | {BASE: base}, indent=1))


def apply_adapter(model: PreTrainedModel, directory: str | Path) -> None:
    """Overwrite a model's experts and other trained weights with an adapter's, in the model's dtype.

    Under ZeRO-3 the model is written layer by layer, and every worker calls this.

    Raises:
        UserError: the adapter does not fit the model.
    """
    config = read_adapter_config(directory)
    path = Path(directory, ADAPTER_WEIGHTS)
    with safe_open(path, framework="pt") as file:
        tensors = _Tensors(file)
        try:
            apply_tensors(model, config, tensors)
        except (KeyError, RuntimeError) as error:
            raise UserError([Problem(str(path), f"does not fit {model.config.model_type}: {error}")]) from error


def apply_tensors(model: PreTrainedModel, config: ExpertConfig, tensors: Any) -> None:
    """Overwrite trained weights with tensors by hub name, as `apply_adapter` does.

    Raises:
        KeyError: a tensor is missing.
        RuntimeError: a tensor has another shape.
    """
    names = HubNames(model)
    for layer in expert_layers(model):
        stacks = {name: getattr(layer.experts, name) for name in layer.stacks}
        with _writing(list(stacks.values()), bool(config.experts.get(layer.index))):
            for expert in config.experts.get(layer.index, ()):
                for name, row in names.to_rows(layer.index, expert, tensors).items():
                    stacks[name].data[expert].copy_(row)
    for name, parameter in _whole_parameters(model, config):
        with _writing([parameter], True):
            parameter.data.copy_(tensors[_hub_name(names, name)])


class _Tensors(dict[str, Tensor]):
    """The tensors of a file, read one at a time."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, set(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"no tensor {name}")
        tensor: Tensor = self.file.get_tensor(name)
        return tensor


def _tuned_row(experts: SplitExperts, stack: str, row: int, dtype: torch.dtype) -> Tensor:
    tuned = experts.part(stack, TUNED)
    assert tuned is not None
    return tuned.detach()[row].to("cpu", dtype)


def _whole_parameters(model: PreTrainedModel, config: ExpertConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield trained parameters that are not rows of experts."""
    trained = trained_names(model, config)
    for name, parameter in model.named_parameters():
        if name in trained and not name.endswith("_tuned"):
            yield name, parameter


def _hub_name(names: HubNames, name: str) -> str:
    """Return a parameter's name on the hub if it is only renamed there, else its name in the model."""
    probe = torch.zeros(names.model.get_parameter(name).shape, dtype=torch.bool, device="meta")
    renamed = revert_weight_conversion(names.model, {name: probe})
    same = len(renamed) == 1 and next(iter(renamed.values())).shape == probe.shape
    return next(iter(renamed)) if same else name


@contextmanager
def _writing(parameters: list[nn.Parameter], enabled: bool) -> Iterator[None]:
    """Gather weights inside a `with` block; the values that rank 0 wrote are distributed afterwards."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided or not enabled:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0):
        yield
