"""The stages that run on workers: one small module each, found by the member field that a job sets.

A new stage is a spec in `finetune_api.stages`, a line in `MODULES` and a module here: with a `make_trainer` where it
takes optimizer steps (`trains`), else with a `perform`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_io import StageIO

MODULES = {
    "pretrain": "finetune_trainer.stages.pretrain.stage",
    "sft": "finetune_trainer.stages.sft.stage",
    "esft": "finetune_trainer.stages.esft.stage",
    "dpo": "finetune_trainer.stages.dpo.stage",
    "evaluate": "finetune_trainer.stages.evaluate.stage",
    "reward": "finetune_trainer.stages.reward.stage",
    "rlhf": "finetune_trainer.stages.rlhf.stage",
    "online": "finetune_trainer.stages.online.stage",
    "synthesize": "finetune_trainer.stages.synthesize.stage",
}


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
    return import_module(MODULES[context.run.job.spec.stages[context.layout.index].kind])
