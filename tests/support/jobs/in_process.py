"""Run one stage in the test's own process, with the trainer that a worker builds, but without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.stage_context import stage_context
from finetune_trainer.stages import make_trainer
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import Placement, ResumePoint, StageContext
from finetune_trainer.training.reset_state import reset_stage_state
from finetune_trainer.training.stage_work import StageWork

Job = dict[str, Any]
torch.set_num_threads(1)  # tiny models gain nothing from more threads, and lose much on a busy machine


def open_stage(job: Job, directory: Path, zero: int = 0) -> StageContext:
    """Return the context of the job's first stage on one CPU worker; relative paths start in `directory`."""
    root = directory / "runs" / job["metadata"]["name"]
    places = {"root": str(root), "baseDir": str(directory), "cacheDir": os.environ["FINETUNE_CACHE"]}
    run = RunConfig.model_validate({"job": job, **places})
    work = StageWork(index=0, zero=zero, flops_per_token=0.0, peak_flops=None)
    return stage_context(run, work, 1, Placement(0, 0, 1, accelerator=False), Storage(str(root)))


class _Saves(TrainerCallback):
    """Saves the feed's state in each checkpoint, like the worker's own callback."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stage.feed.save(state.global_step, Path(args.output_dir, f"checkpoint-{state.global_step}"))


@contextmanager
def resumed(context: StageContext, step: int) -> Iterator[Any]:
    """Yield the stage's trainer after its last step, resumed from the checkpoint of `step`."""
    directory = context.output_dir / f"checkpoint-{step}"
    with trained(replace(context, resumed=ResumePoint(step, directory)), checkpoint=directory) as trainer:
        yield trainer


@contextmanager
def trained(
    context: StageContext,
    evaluate: bool = False,
    checkpoint: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Iterator[Any]:
    """Yield the stage's trainer after its last step, and reset the libraries' global state afterwards.

    Args:
        evaluate: whether to evaluate before the first and after the last step.
        checkpoint: directory to resume from.
        callbacks: additional callbacks of the trainer.
    """
    trainer = make_trainer(context)
    trainer.args.eval_on_start = evaluate
    trainer.remove_callback(PrinterCallback)
    for callback in (_Saves(trainer), *callbacks):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if evaluate:
        trainer.evaluate()
    try:
        yield trainer
    finally:
        reset_stage_state()


def losses(job: Job, directory: Path) -> list[float]:
    """Return the loss of every step of the job's first stage."""
    with trained(open_stage(job, directory)) as trainer:
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]
