"""Callback that stops training at the last model whose KL to the reference is within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WITHIN = "within-{}.safetensors"
"""File in a checkpoint, by rank: a worker's last weights within the bound."""
Weights = dict[str, torch.Tensor]


class KlBound(TrainerCallback):
    """Restore the last weights within a KL bound, and stop training, when a step exceeds the bound.

    The KL of a step is measured on completions from before its update, so it is that of the weights before the update,
    which the trainer copies. Models beyond the bound are not saved, so a resumed run stops at the same one.
    """

    def __init__(self, trainer: Any, bound: float) -> None:
        self.trainer, self.bound = trainer, bound
        self.within: Weights | None = None
        self.before: Weights | None = None
        self.passed: tuple[int, float] | None = None
        """Step and KL, in nats per completion, at which the bound was exceeded."""

    def remember(self) -> None:
        """Copy the trained weights to the CPU before an update. Every worker calls this."""
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
        """Write the last weights within the bound into a checkpoint."""
        if self.within is not None:
            save_file(self.within, directory / WITHIN.format(rank))

    def load(self, directory: Path, rank: int) -> None:
        """Load what `save` wrote; skip it if the shapes differ, as with ZeRO-3 at another world size."""
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
    """Return the local tensor of a weight: under ZeRO-3 this rank's partition."""
    part: torch.Tensor = getattr(weight, "ds_tensor", weight)
    return part
