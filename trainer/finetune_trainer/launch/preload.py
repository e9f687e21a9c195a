"""What a job's processes import, so that one process can do it for all of them (`forks`)."""

from __future__ import annotations

from fsspec.registry import known_implementations

from finetune_api.runconfig import RunConfig

_LIBRARIES = (
    "finetune_api.runconfig",
    "torch",
    "datasets",
    "accelerate",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "finetune_trainer.data",
    "finetune_trainer.model.load",
    "finetune_trainer.plan.job",
)
"""None of them imports Ray."""
_WORKERS = ("finetune_trainer.launch.stage_run", "ray.train.v2._internal.execution.controller.controller")


def libraries(run: RunConfig) -> list[str]:
    """Modules of every process of the job, its store's among them."""
    scheme, is_uri, _ = run.root.partition("://")
    store = known_implementations.get(scheme) if is_uri else None
    return [*_LIBRARIES, *([store["class"].rpartition(".")[0]] if store else [])]


def worker_modules(run: RunConfig) -> list[str]:
    """Modules of the workers, of Ray Train's helpers and of the job's stages, which need Ray."""
    return [*_WORKERS, *sorted({f"finetune_trainer.stages.{stage.kind}" for stage in run.job.spec.stages})]
