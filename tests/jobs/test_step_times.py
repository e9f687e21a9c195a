"""The time that each worker spends on a step itself, without waiting, which shows the slow node."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.jobs.guarded_stage import guarded, job, rows
from support.jobs.two_workers import on_two_workers
from transformers import TrainerCallback

from finetune_api.runconfig import RunConfig
from finetune_trainer.launch.stage_run import stage_context
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import Placement
from finetune_trainer.training.stage_work import StageWork
from finetune_trainer.training.step_times import LEAST, StepTimes, spread


def test_the_node_that_is_slower_than_the_others_is_named() -> None:
    found = spread([0.1, 0.11, 0.2, 0.22, 0.1, 0.1], ["a", "a", "b", "b", "c", "c"])
    assert (found.node, found.median, found.most) == ("b", pytest.approx(0.105), 0.22)
    assert found.factor == pytest.approx(0.21 / 0.1025)


@pytest.mark.parametrize(
    ("seconds", "hosts"),
    [
        ([0.1, 0.3], ["a", "a"]),
        ([0.1, 0.14], ["a", "b"]),
        ([0.001, 0.009], ["a", "b"]),
        ([0.1], ["a"]),
    ],
    ids=["one node", "not much slower", "noise of short steps", "one worker"],
)
def test_no_node_is_named_without_need(seconds: list[float], hosts: list[str]) -> None:
    assert spread(seconds, hosts).node is None


def test_there_are_no_times_before_enough_steps() -> None:
    times = StepTimes(accelerator=False)
    for _ in range(LEAST - 1):
        times.begin()
        times.exchange()
    assert times.own() is None
    times.exchange()
    assert times.own() is None, "an exchange without a beginning is no step"
    times.begin()
    times.exchange()
    assert times.own() is not None


SLEEP = 0.5


def test_the_slow_worker_shows_though_both_take_equally_long(base_job: dict[str, Any], tmp_path: Path) -> None:
    """One of two workers loads and computes slowly; the other one waits for it at each step."""
    body = job(base_job, "fail", rows(16), perDeviceTrainBatchSize=1, saveSteps=99)

    def train(rank: int) -> list[float]:
        places = {"root": str(tmp_path / "x"), "baseDir": str(tmp_path), "cacheDir": os.environ["FINETUNE_CACHE"]}
        run = RunConfig.model_validate({"job": body, **places})
        place = Placement(rank, rank, 2, accelerator=False)
        context = stage_context(run, StageWork(0, 0, 0.0, None, 2), 1, place, Storage(str(tmp_path / "x")))
        with guarded(context, [], (Slow(rank),)) as trainer:
            trainer.stage.times = StepTimes(accelerator=False)
            trainer.stage.times.leave_out(trainer.accelerator)
            collate = trainer.data_collator
            trainer.data_collator = lambda batch: (time.sleep(SLEEP * rank), collate(batch))[1]
            trainer.train()
            return [seconds for (seconds,) in Collectives().gather_numbers([trainer.stage.times.own()])]

    for quick, slow in on_two_workers(train):
        assert slow > quick + SLEEP, "it sleeps twice as long"


class Slow(TrainerCallback):
    """Makes each step of rank 1 slower."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.rank == 1:
            time.sleep(SLEEP)
