"""The stages: a folder each, with the name of the member field that a job sets.

A new stage is a spec in `finetune_api.stages`, which declares what the rest of the project asks about the stage
(`finetune_api.declaration`), and a folder here. Its `stage.py` has a `make_trainer` where the stage takes optimizer
steps (`trains`), else a `perform`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_io import StageIO


def perform(context: StageContext, tools: StageIO) -> dict[str, float]:
    """Run a stage that takes no optimizer steps; returns its metrics. Every worker calls it."""
    metrics: dict[str, float] = _module(context).perform(context, tools)
    return metrics


def make_trainer(context: StageContext) -> Any:
    """The trainer of the context's stage."""
    trainer = _module(context).make_trainer(context)
    trainer.stage.feed = context.feed()
    if context.data.report.streaming:
        trainer.train_dataset = context.data.train
    return trainer


def _module(context: StageContext) -> Any:
    """Only the module of that stage is imported: TRL's trainers load slowly."""
    return import_module(f"{__name__}.{context.stage.kind}.stage")
