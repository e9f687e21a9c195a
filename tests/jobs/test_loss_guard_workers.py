"""`runPolicy.onBadLoss` on two workers: both drop the same update under every ZeRO stage."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.guarded_stage import guarded, job, order, rows, weights
from support.jobs.two_workers import on_two_workers
from transformers import TrainerCallback

from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import UserError
from finetune_trainer.launch.stage_run import stage_context
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import Placement
from finetune_trainer.training.deepspeed import join_process_group
from finetune_trainer.training.stage_work import StageWork

Job = dict[str, Any]
COUNT, ROWS_PER_STEP, BAD_STEP = 16, 4, 2


def trained(rank: int, zero: int, body: Job, directory: Path) -> tuple[list[list[float]], list[str]]:
    """Return the sums of the weights after each step, and the log; each worker makes two forward passes per step."""
    root = directory / f"zero-{zero}"
    places = {"root": str(root), "baseDir": str(directory), "cacheDir": os.environ["FINETUNE_CACHE"]}
    run = RunConfig.model_validate({"job": body, **places})
    join_process_group(zero, accelerator=False)
    work = StageWork(0, zero, 0.0, None, ROWS_PER_STEP)
    context = stage_context(run, work, 1, Placement(rank, rank, 2, accelerator=False), Storage(str(root)))
    said: list[str] = []
    sums: list[list[float]] = []

    class Sums(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            sums.append(whole(trainer, zero))

    with guarded(context, said, (Sums(),)) as trainer:
        trainer.train()
    return sums, said


def whole(trainer: Any, zero: int) -> list[float]:
    """Return the sum of each weight, gathered under ZeRO-3."""
    if zero < 3:
        return [float(one.double().sum()) for one in weights(trainer).values()]
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        return [float(one.detach().double().sum()) for one in trainer.model.parameters()]


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_both_workers_drop_the_update_of_one_worker_s_bad_row(zero: int, base_job: Job, tmp_path: Path) -> None:
    bad = order(COUNT)[BAD_STEP * ROWS_PER_STEP + 1]
    body = job(base_job, "skip", rows(COUNT, bad), perDeviceTrainBatchSize=1, saveSteps=99)
    (sums, said), (others, _) = on_two_workers(lambda rank: trained(rank, zero, body, tmp_path))
    assert sums == others and len(sums) == COUNT // ROWS_PER_STEP
    changed = [one != other for one, other in pairwise(sums)]
    assert changed == [True, False, True] and not any(map(math.isnan, sums[-1]))
    assert len(said) == 1 and f"worker 1, forward pass 1: rows {bad}" in said[0] and "it is skipped" in said[0]


@pytest.mark.long
def test_fail_ends_both_workers_alike(base_job: Job, tmp_path: Path) -> None:
    bad = order(COUNT)[BAD_STEP * ROWS_PER_STEP + 1]
    body = job(base_job, "fail", rows(COUNT, bad), perDeviceTrainBatchSize=1, saveSteps=99)

    def failed(rank: int) -> str:
        with pytest.raises(UserError) as caught:
            trained(rank, 2, body, tmp_path)
        return str(caught.value)

    one, other = on_two_workers(failed)
    assert one == other and f"rows {bad}" in one and "step 3" in one
    assert torch.distributed.is_initialized() is False, "the workers are other processes"
