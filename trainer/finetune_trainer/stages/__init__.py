"""The trained stages: one small module each, found by the member field that a job sets.

A new stage is a spec in `finetune_api.stages`, a module here with a `make_trainer`, and a line in `MODULES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from finetune_trainer.training.context import StageContext

MODULES = {
    "pretrain": "finetune_trainer.stages.pretrain",
    "sft": "finetune_trainer.stages.sft",
    "esft": "finetune_trainer.stages.esft",
    "dpo": "finetune_trainer.stages.dpo",
}


def make_trainer(context: StageContext) -> Any:
    """The trainer of the context's stage. Only that stage's module is imported: TRL's trainers load slowly."""
    kind = context.run.job.spec.stages[context.layout.index].kind
    trainer = import_module(MODULES[kind]).make_trainer(context)
    trainer.feed = context.feed()
    if context.data.report.streaming:
        trainer.train_dataset = context.data.train
    return trainer
