"""What a job will need: parameters, tokens, steps and memory, before anything runs.

`plan_job` and `render` load on first use: this package also holds small parts that import nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_trainer.plan.job import JobPlan, PlanContext, plan_job
    from finetune_trainer.plan.rendering import render

__all__ = ["JobPlan", "PlanContext", "plan_job", "render"]


def __getattr__(name: str) -> Any:
    if name == "render":
        from finetune_trainer.plan.rendering import render

        return render
    if name in __all__:
        from finetune_trainer.plan import job

        return getattr(job, name)
    raise AttributeError(name)
