"""Run one stage in this process like a Ray Train worker: plan, build, train, measure and release it."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from gpu_checks.models import saved_model
from gpu_checks.record import Json, Options, require

WARM_STEPS = 2
"""Steps that are not timed: kernels are chosen and compiled, and the allocator grows."""


@dataclass(frozen=True)
class Figures:
    """Measurements of a stage. Bytes are of tensors on the device; with `--tiny`, of the process."""

    losses: list[float]
    seconds: list[float]
    """Seconds of each step but the first."""
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None
    measured: int
    """Peak bytes, without CUDA's context."""
    planned: int
    left: int
    """Bytes of tensors after the stage, beyond those before it."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the median steady step."""
        steady = self.seconds[WARM_STEPS - 1 :] or self.seconds
        return self.tokens_per_step / statistics.median(steady) if steady else math.nan

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak (arXiv 2204.02311, appendix B, without rematerialisation)."""
        return self.tokens_per_second * self.flops_per_token / self.peak_flops if self.peak_flops else None

    def values(self) -> Json:
        """Return the values that a check reports of the stage."""
        told = {"loss": [self.losses[0], self.losses[-1]], "tokens_per_second": self.tokens_per_second}
        return told | {"mfu": self.mfu, "left_mib": self.left / 2**20, "step_seconds": self.seconds}


def memory_row(options: Options, name: str, figures: Figures) -> Json:
    """Return a row of measured/planned memory; no ratio with `--tiny`, where the libraries outweigh the model."""
    row: Json = {"name": name, "measured_gib": figures.measured / 2**30, "planned_gib": figures.planned / 2**30}
    return row | {"ratio": None if options.tiny else figures.measured / figures.planned}


def require_trained(figures: Figures, steps: int, values: Json) -> None:
    """Check that a stage has trained.

    Raises:
        CheckFailed: it took another number of steps than requested, or a loss is not a number.
    """
    require(len(figures.losses) == steps, f"{len(figures.losses)} steps, expected {steps}", values)
    require(all(map(math.isfinite, figures.losses)), f"losses {figures.losses}", values)


def run_stage(
    options: Options, name: str, shape: str, stage: Json, zero: int = 0, model: Json | None = None
) -> Figures:
    """Train one stage of a job.

    Args:
        name: of the job and its directories.
        shape: of `models.SHAPES`.
        stage: in the format of a job, such as `{"sft": {...}}`.
        model: replaces the shape's, in the format of a job's `model` field.
    """
    from finetune_trainer.launch.stage_run import stage_context
    from finetune_trainer.stages import make_trainer
    from finetune_trainer.storage.filesystem import Storage
    from finetune_trainer.training.context import Placement
    from finetune_trainer.training.deepspeed import join_process_group
    from finetune_trainer.training.memory import reset_peaks, usage
    from finetune_trainer.training.reset_state import release, reset_stage_state
    from finetune_trainer.training.stage_work import StageWork

    run = run_config(options, name, shape, stage, zero, model)
    join_group(options)
    join_process_group(zero, options.accelerator)
    work = StageWork(index=0, zero=zero, flops_per_token=0.0, peak_flops=None)
    threads = 1 if options.tiny else len(os.sched_getaffinity(0))
    context = stage_context(run, work, threads, Placement(0, 0, 1, options.accelerator), Storage(run.root))
    plan, peak_flops = plan_of(run, context)
    before = _held(options)
    reset_peaks(options.accelerator)
    trainer = make_trainer(context)
    clock = clocked(trainer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    measured = usage(options.accelerator, context=0).peak
    release(trainer)
    del trainer
    reset_stage_state()
    return Figures(
        losses=losses,
        seconds=[after - earlier for earlier, after in pairwise(clock)],
        tokens_per_step=plan.tokens_per_step or 0,
        flops_per_token=plan.flops_per_token,
        peak_flops=peak_flops,
        measured=measured,
        planned=plan.memory.total - plan.memory.context - plan.memory.nccl,
        left=_held(options) - before,
    )


def run_config(options: Options, name: str, shape: str, stage: Json, zero: int, model: Json | None) -> Any:
    """Return the job of one stage as the driver passes it to its workers."""
    from finetune_api.runconfig import RunConfig

    places = {"root": str(options.work / "runs" / name), "baseDir": str(options.work)}
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": model or {"path": str(saved_model(options, shape))},
            "stages": [stage],
            "sharding": {"zero": zero},
            "storage": {"path": str(options.work / "runs")},
        },
    }
    return RunConfig.model_validate({"job": job, "cacheDir": str(options.work / "cache"), **places})


def plan_of(run: Any, context: Any) -> tuple[Any, float | None]:
    """Return the stage's plan on this device with the driver's knowledge of its data, and the device's peak FLOP/s."""
    from finetune_trainer.launch.preparation import data_size
    from finetune_trainer.plan.devices import local_device
    from finetune_trainer.plan.job import plan_job
    from finetune_trainer.plan.records import PlanContext

    size = data_size(context.data.report)
    plan = plan_job(run, PlanContext(local_device(), 1, context.config), rows=lambda _: size)
    return plan.stages[0], plan.peak


def join_group(options: Options) -> None:
    """Join a process group of one, as Ray Train sets one up for its workers."""
    if torch.distributed.is_initialized():
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    backend = "nccl" if options.accelerator else "gloo"
    place = options.work / f"rendezvous-{os.getpid()}"
    torch.distributed.init_process_group(backend, init_method=f"file://{place}", rank=0, world_size=1)


def clocked(trainer: Any) -> list[float]:
    """Return a list that collects the time of each step's end, when its loss has been read from the device."""
    from transformers import PrinterCallback, TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                times.append(time.perf_counter())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock)
    return times


def _held(options: Options) -> int:
    """Return the bytes of tensors on the GPU, or with `--tiny` of the process."""
    gc.collect()
    if options.accelerator:
        torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one of some MiB per thread, in torch's allocator
        return torch.cuda.memory_allocated()
    storages = [one.untyped_storage() for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
