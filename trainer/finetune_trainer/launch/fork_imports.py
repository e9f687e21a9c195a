"""The modules that the fork server (`finetune_trainer.forks`) imports for a job, and whether the job can use it.

The fork server is for jobs on CPUs. A process that has opened a GPU can't be forked, and bitsandbytes opens the GPUs
when it is imported, to choose its native library by their compute capability. If the GPUs were hidden from that import,
bitsandbytes would choose its library for CPUs, and every quantized layer would fail in the forks. So a job on GPUs
starts its processes without the server, and a job on CPUs hides the machine's GPUs from the server.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fsspec.registry import known_implementations

from finetune_api.runconfig import RunConfig
from finetune_trainer.forks.client import fork_server
from finetune_trainer.forks.wire import OFF, SOCKET_VARIABLE, is_off

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
"""None of these imports Ray."""
_WORKERS = ("finetune_trainer.launch.stage_run", "ray.train.v2._internal.execution.controller.controller")
DEVICES = Path("/dev")
_HIDDEN = ("", "-1")


def forks(run: RunConfig, log: Callable[[str], None]) -> AbstractContextManager[object]:
    """Return a context manager that runs the fork server for the job's processes.

    It does nothing if the job uses GPUs or the environment variable FINETUNE_FORK_SERVER is `0`.

    Args:
        run: the job.
        log: receives the reason if there is no server.
    """
    if is_off():
        log(f"processes start without the fork server: {SOCKET_VARIABLE}={OFF}")
        return nullcontext()
    if not uses_gpus(run):
        return fork_server(libraries(run), worker_modules(run))
    log(
        "processes start without the fork server: libraries open GPUs when imported, and such a process can't be forked"
    )
    return nullcontext()


def uses_gpus(run: RunConfig) -> bool:
    """Whether the job computes on GPUs, as far as is known without importing torch.

    A job that does not set `resources.gpusPerNode` uses the GPUs of the machine that runs it; on a cluster none.
    """
    requested = run.job.spec.resources.gpus_per_node
    if requested is not None or os.environ.get("CUDA_VISIBLE_DEVICES") in _HIDDEN:
        return bool(requested)
    return (
        any(path.name.removeprefix("nvidia").isdecimal() for path in DEVICES.glob("nvidia*"))
        or (DEVICES / "dxg").exists()
    )


def libraries(run: RunConfig) -> list[str]:
    """Return the modules of every process of the job, including that of its storage."""
    scheme, is_uri, _ = run.root.partition("://")
    filesystem = known_implementations.get(scheme) if is_uri else None
    return [*_LIBRARIES, *([filesystem["class"].rpartition(".")[0]] if filesystem else [])]


def worker_modules(run: RunConfig) -> list[str]:
    """Return the modules that need Ray: of the workers, of Ray Train's helper actors and of the job's stages."""
    return [*_WORKERS, *sorted({f"finetune_trainer.stages.{stage.kind}.stage" for stage in run.job.spec.stages})]
