"""What a job's processes import, so that one process can do it for all of them (`finetune_trainer.forks`).

The fork server is for jobs on CPUs. A process that has opened a GPU can't be forked, and bitsandbytes opens the GPUs at
its import, to choose its library by their compute capability. Hidden from the import, they would still be there in the
forks, but bitsandbytes would have chosen its library for CPUs, and every quantized layer would fail. So a job on GPUs
starts its processes without the server, and a job on CPUs hides the machine's GPUs from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fsspec.registry import known_implementations

from finetune_api.runconfig import RunConfig
from finetune_trainer.forks.client import fork_server

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


DEVICES = Path("/dev")
_HIDDEN = ("", "-1")


def forks(run: RunConfig, log: Callable[[str], None]) -> AbstractContextManager[object]:
    """Return the fork server for the job's processes, or a context that does nothing where the job uses GPUs.

    Args:
        log: called with the reason why there is no server.
    """
    if not uses_gpus(run):
        return fork_server(libraries(run), worker_modules(run))
    log("processes start without the fork server: libraries open GPUs at their import, after which nothing can fork")
    return nullcontext()


def uses_gpus(run: RunConfig) -> bool:
    """Whether the job computes on GPUs, as far as can be told without importing torch.

    A job that does not say takes those of the machine that runs it; on a cluster none.
    """
    wanted = run.job.spec.resources.gpus_per_node
    if wanted is not None or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return bool(wanted)
    return (
        any(path.name.removeprefix("nvidia").isdecimal() for path in DEVICES.glob("nvidia*"))
        or (DEVICES / "dxg").exists()
    )


def libraries(run: RunConfig) -> list[str]:
    """Modules of every process of the job, its store's among them."""
    scheme, is_uri, _ = run.root.partition("://")
    store = known_implementations.get(scheme) if is_uri else None
    return [*_LIBRARIES, *([store["class"].rpartition(".")[0]] if store else [])]


def worker_modules(run: RunConfig) -> list[str]:
    """Modules of the workers, of Ray Train's helpers and of the job's stages, which need Ray."""
    return [*_WORKERS, *sorted({f"finetune_trainer.stages.{stage.kind}.stage" for stage in run.job.spec.stages})]
