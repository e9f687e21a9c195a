"""Stages in this process under the guard against bad losses, and rows that give such losses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.jobs.tiny_rows import dialogue
from transformers import PrinterCallback, TrainerCallback

from finetune_trainer.stages import make_trainer
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.dropped_steps import DroppedSteps
from finetune_trainer.training.loss_guard import LossGuard
from finetune_trainer.training.reset_state import reset_stage_state

Job = dict[str, Any]
BAD = "@"
"""The character that gives NaN."""


def rows(count: int, *bad: int) -> list[Job]:
    return [dialogue(f"{a} plus 1", BAD if a in bad else f"makes {a + 1}") for a in range(count)]


def order(count: int, seed: int = 42) -> list[int]:
    """Return the rows of the first epoch in the order of training."""
    prepared = np.random.default_rng([seed, 0]).permutation(count)
    return prepared[torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()].tolist()


def job(base: Job, policy: str, data: list[Job], **stage: Any) -> Job:
    """Return an SFT job of one epoch with two rows per step, which logs and saves each step."""
    fields = {
        "data": {"sources": [{"inline": data}]},
        "maxLength": 64,
        "perDeviceTrainBatchSize": 2,
        "learningRate": 1e-3,
        "loggingSteps": 1,
        "saveSteps": 1,
        "saveTotalLimit": 99,
        "numTrainEpochs": 1,
        "warmupRatio": 0.0,
    }
    base["spec"] |= {"stages": [{"sft": fields | stage}], "runPolicy": {"onBadLoss": policy}}
    return base


class _Poison(TrainerCallback):
    """Replaces the embedding of the bad token by NaN in the trained model."""

    def __init__(self, trainer: Any) -> None:
        self.token = trainer.processing_class(BAD, add_special_tokens=False)["input_ids"][-1]
        self.handle = trainer.model.get_input_embeddings().register_forward_hook(self.hook)

    def hook(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == self.token)[..., None], math.nan)


class _Publishes(TrainerCallback):
    """Publishes each checkpoint, like the worker's own callback."""

    def __init__(self, store: CheckpointStore, guard: LossGuard) -> None:
        self.store, self.guard = store, guard

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.guard.collectives.barrier()
        if self.guard.context.placement.rank == 0:
            self.store.publish(state.global_step, world_size=1, zero=0, rows_per_step=2, shards=1)
        self.guard.collectives.barrier()


@contextmanager
def guarded(context: StageContext, said: list[str], callbacks: tuple[TrainerCallback, ...] = ()) -> Iterator[Any]:
    """Yield the stage's trainer before its first step."""
    storage = Storage(context.run.root)
    store = CheckpointStore(storage, context.layout, Path(context.output_dir, "scratch"))
    guard = LossGuard(context, Collectives(), DroppedSteps(store), said.append)
    trainer = make_trainer(context)
    trainer.remove_callback(PrinterCallback)
    guard.attach(trainer)
    for callback in (_Publishes(store, guard), *callbacks):
        trainer.add_callback(callback)
    _Poison(trainer)
    try:
        yield trainer
    finally:
        reset_stage_state()


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}


def saved(context: StageContext, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(context.output_dir / f"checkpoint-{step}" / "model.safetensors")


def records(context: StageContext) -> Any:
    return json.loads(Storage(context.run.root).read_text(context.layout.dropped))
