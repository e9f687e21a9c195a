"""Ends a stage at the last model whose KL to the reference is within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WITHIN = "within-{}.safetensors"
"""In a checkpoint: the weights that a worker would go back to."""
Weights = dict[str, torch.Tensor]


class KlBound(TrainerCallback):
    """The KL of a step is that of the model before its update, measured on the answers drawn from it.

    So the trainer hands over the weights before each update; the step that shows the bound passed brings back those of
    the last step within it, and no checkpoint is kept of what lies beyond: a run that dies now finds the same end.
    """

    def __init__(self, trainer: Any, bound: float) -> None:
        self.trainer, self.bound = trainer, bound
        self.within: Weights | None = None
        self.before: Weights | None = None
        self.passed: tuple[int, float] | None = None
        """Step and KL of the model that was too far."""

    def remember(self) -> None:
        """Keep the weights as they are, before an update. Every worker calls it."""
        self.before = {name: _held(weight).detach().cpu().clone() for name, weight in self._trained()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kl = self.trainer.kl_of_step()
        if kl is not None and kl <= self.bound:
            self.within = self.before
        elif kl is not None:
            self._go_back(state, control, kl)
            return
        if state.global_step >= state.max_steps and (kl := self.trainer.kl_now()) > self.bound:
            self._go_back(state, control, kl)

    def save(self, directory: Path, rank: int) -> None:
        """Write the weights to go back to into a checkpoint."""
        if self.within is not None:
            save_file(self.within, directory / WITHIN.format(rank))

    def load(self, directory: Path, rank: int) -> None:
        """The inverse of `save`; nothing where other workers wrote other parts (ZeRO-3)."""
        paths = (path for path in (directory / WITHIN.format(one) for one in (rank, 0)) if path.is_file())
        held = {name: _held(weight).shape for name, weight in self._trained()}
        for found in map(load_file, paths):
            if {name: one.shape for name, one in found.items()} == held:
                self.within = found
                return

    def _go_back(self, state: TrainerState, control: TrainerControl, kl: float) -> None:
        self.passed = state.global_step, kl
        if self.within is not None:
            for name, weight in self._trained():
                _held(weight).data.copy_(self.within[name])
        self.trainer.stage.keeps_last = False
        control.should_save = False
        control.should_training_stop = True

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _held(weight: torch.nn.Parameter) -> torch.Tensor:
    """What this worker holds of a weight: under ZeRO-3 its part."""
    part: torch.Tensor = getattr(weight, "ds_tensor", weight)
    return part
