"""Training stages: one package per stage, named after the stage's field in the job.

To add a stage, add a spec to `finetune_api.stages` that declares the stage's properties (`finetune_api.declaration`),
and a package here. Its `stage.py` defines `make_trainer` if the stage takes optimizer steps (`trains`), else `perform`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_io import StageIO


def perform(context: StageContext, tools: StageIO) -> dict[str, float]:
    """Run a stage that takes no optimizer steps, and return its metrics. Every worker calls this."""
    metrics: dict[str, float] = _module(context).perform(context, tools)
    return metrics


def make_trainer(context: StageContext) -> Any:
    """Return the trainer of the context's stage."""
    trainer = _module(context).make_trainer(context)
    trainer.stage.feed = context.feed()
    if context.data.report.streaming:
        trainer.train_dataset = context.data.train
    return trainer


def _module(context: StageContext) -> Any:
    """Import the module of one stage only, because TRL's trainers are slow to import."""
    return import_module(f"{__name__}.{context.stage.kind}.stage")
