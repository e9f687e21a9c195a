"""`finetune plan`: what a job needs, as tables or JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from finetune_api.problems import Problem, did_you_mean
from finetune_api.runconfig import RunConfig
from finetune_trainer.data import prepare
from finetune_trainer.errors import UserError
from finetune_trainer.launch.cluster import Workers, plan_workers
from finetune_trainer.launch.preparation import data_size
from finetune_trainer.model.load import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.plan import PlanContext, plan_job, render
from finetune_trainer.plan.devices import MEMORIES, Device, known_device, local_device
from finetune_trainer.plan.job import DataSize
from finetune_trainer.plan.quantities import parse_quantity
from finetune_trainer.storage import Storage


def show_plan(run: RunConfig, device: str | None, as_json: bool) -> None:
    """Print the plan. Data is tokenised (and kept for the run) where a tokenizer exists already.

    Raises:
        UserError: the job can't be planned, or the device is not known.
    """
    workers = plan_workers(run.job.spec.resources)
    place = _device(device, workers)
    plan = plan_job(run, PlanContext(place, workers.most), lambda index: _data(run, index, workers))
    if as_json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        Console().print(render(plan))


def _device(name: str | None, workers: Workers) -> Device:
    if name is None:
        return local_device(workers.most)
    known = known_device(name)
    if known is not None:
        return known
    try:
        return replace(local_device(), name=name, memory_bytes=parse_quantity(name), kind="cuda")
    except ValueError:
        message = f"{name!r} is neither a known device nor a size such as 80Gi{did_you_mean(name, MEMORIES)}"
        raise UserError([Problem("--device", message)]) from None


def _data(run: RunConfig, index: int, workers: Workers) -> DataSize | None:
    """What preparing a stage's data tells; None where its tokenizer is still to be trained."""
    if run.job.spec.stages[0].tokenizer is not None:
        return None
    stage = run.job.spec.stages[index]
    source = stage_source(run, 0, Storage(run.root))
    tokenizer = load_tokenizer(source)
    prepared = prepare(
        stage.spec,  # type: ignore[arg-type]
        tokenizer,
        context_length(load_config(source, tokenizer)),
        where=f"stages[{index}].{stage.kind}",
        cache_dir=Path(run.cache_dir),
        base_dir=Path(run.base_dir),
        num_proc=workers.cpus * workers.most,
    )
    return data_size(prepared.report)
