"""Estimate a job's parameters, tokens, steps and memory before it runs.

`plan_job` and `render` are imported on first use, because other modules of this package must be quick to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_trainer.plan.job import plan_job
    from finetune_trainer.plan.records import JobPlan, PlanContext
    from finetune_trainer.plan.rendering import render

__all__ = ["JobPlan", "PlanContext", "plan_job", "render"]
_HOMES = {"JobPlan": "records", "PlanContext": "records", "plan_job": "job", "render": "rendering"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
