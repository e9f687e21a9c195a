"""`runPolicy.onBadLoss` on real stages: a model with bad numbers is neither trained further nor saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.guarded_stage import guarded, job, order, records, rows, saved, weights
from support.jobs.in_process import open_stage
from support.jobs.tiny_rows import dialogue
from transformers import TrainerCallback

from finetune_trainer.errors import UserError
from finetune_trainer.training.dropped_steps import MOST, RolledBack

Job = dict[str, Any]
COUNT = 12


def poisoned(base_job: Job, policy: str, *steps: int, **stage: Any) -> tuple[Job, list[list[int]]]:
    """Return a job in which one row of each of these steps (from 0) gives NaN, and the rows of these steps."""
    drawn = order(COUNT)
    bad = [drawn[2 * step + 1] for step in steps]
    return job(base_job, policy, rows(COUNT, *bad), **stage), [drawn[2 * step : 2 * step + 2] for step in steps]


def test_fail_ends_the_job_before_the_update_and_names_the_rows(base_job: Job, tmp_path: Path) -> None:
    bad_job, (bad,) = poisoned(base_job, "fail", 3)
    context = open_stage(bad_job, tmp_path)
    with guarded(context, []) as trainer, pytest.raises(UserError) as caught:
        trainer.train()
    (problem,) = caught.value.problems
    assert problem.path == "stages[0].sft.learningRate"
    assert f"step 4: the loss is nan (worker 0, forward pass 1: rows {bad[0]}, {bad[1]})" in problem.message
    assert "try 0.0001 (it is 0.001)" in problem.message and "runPolicy.onBadLoss" in problem.message
    assert sorted(path.name for path in context.output_dir.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (1, 2, 3)
    ]
    assert all(one.isfinite().all() for one in saved(context, 3).values())


def test_skip_drops_the_update_and_trains_on(base_job: Job, tmp_path: Path) -> None:
    """The loss curve continues without the skipped step."""
    bad_job, (bad,) = poisoned(base_job, "skip", 3)
    context, said = open_stage(bad_job, tmp_path), []
    with guarded(context, said) as trainer:
        trainer.train()
        end, history = weights(trainer), [row for row in trainer.state.log_history if "loss" in row]
    assert any(f"stages[0].sft.data, counted from 0: {bad[0]}, {bad[1]}; it is skipped" in line for line in said), said
    assert all(torch.equal(saved(context, 3)[name], saved(context, 4)[name]) for name in saved(context, 3))
    assert any(not torch.equal(saved(context, 4)[name], saved(context, 5)[name]) for name in saved(context, 4))
    assert all(one.isfinite().all() for one in end.values())
    assert [math.isnan(row["loss"]) for row in history] == [False, False, False, True, False, False]
    assert history[-1]["skipped_steps"] == 1 and "skipped_steps" not in history[0]
    assert len({row["learning_rate"] for row in history}) == 6, "the schedule follows the steps"


def test_the_mean_loss_of_several_steps_leaves_the_dropped_one_out(base_job: Job, tmp_path: Path) -> None:
    each: dict[int, list[float]] = {}
    for logging in (1, 6):
        bad_job, _ = poisoned(base_job, "skip", 3, loggingSteps=logging)
        with guarded(open_stage(bad_job, tmp_path / str(logging)), []) as trainer:
            trainer.train()
            each[logging] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trained = [loss for loss in each[1] if not math.isnan(loss)]
    assert len(trained) == 5 and each[6] == [pytest.approx(sum(trained) / 5, abs=1e-4)]


def test_skipping_ends_where_every_step_is_bad(base_job: Job, tmp_path: Path) -> None:
    bad_job = job(base_job, "skip", rows(COUNT, *range(COUNT)))
    with guarded(open_stage(bad_job, tmp_path), []) as trainer, pytest.raises(UserError, match="last of 5 bad steps"):
        trainer.train()


def test_rollback_leaves_the_step_out_when_it_comes_again(base_job: Job, tmp_path: Path) -> None:
    """After the rollback, the second worker group ends with the weights of a job that skips the step."""
    bad_job, (bad,) = poisoned(base_job, "rollback", 3)
    context = open_stage(bad_job, tmp_path)
    with guarded(context, []) as trainer, pytest.raises(RolledBack, match="rolled back to step 3"):
        trainer.train()
    (record,) = records(context)
    assert (record["step"], record["rows"], record["checkpoint"]) == (3, bad, 3)
    with guarded(context, []) as trainer:
        trainer.train(resume_from_checkpoint=str(context.output_dir / "checkpoint-3"))
        rolled = weights(trainer)
    with guarded(open_stage(job(base_job, "skip", rows(COUNT, bad[1])), tmp_path / "skip"), []) as trainer:
        trainer.train()
        assert all(torch.equal(rolled[name], one) for name, one in weights(trainer).items())


def test_rollbacks_to_one_checkpoint_are_limited_and_end_with_the_rows(base_job: Job, tmp_path: Path) -> None:
    bad_job, bad = poisoned(base_job, "rollback", 0, 1, 2, 3, saveSteps=99)
    context = open_stage(bad_job, tmp_path)
    for _ in range(MOST):
        with guarded(context, []) as trainer, pytest.raises(RolledBack, match="rolled back to step 0"):
            trainer.train()
    with guarded(context, []) as trainer, pytest.raises(UserError) as caught:
        trainer.train()
    assert "rollbacks to step 0 did not help" in str(caught.value)
    assert all(", ".join(map(str, each)) in str(caught.value) for each in bad)


class Overflow(TrainerCallback):
    """Makes an update that overflows a weight."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        next(model.parameters()).data[0, 0] = math.inf


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_model_that_an_update_has_ruined_is_not_saved(policy: str, base_job: Job, tmp_path: Path) -> None:
    """The loss and the gradients were finite; only the update overflowed."""
    context = open_stage(job(base_job, policy, rows(COUNT)), tmp_path)
    with (
        guarded(context, [], (Overflow(),)) as trainer,
        pytest.raises(UserError, match="trained weights are not finite"),
    ):
        trainer.train()
    assert not list(context.output_dir.glob("checkpoint-*/manifest.json"))


def garbage(base_job: Job, policy: str, *places: int) -> Job:
    """Return a job of equal rows with random text at these positions of the training order, one row per step."""
    data = [dialogue("one plus one", "makes two") for _ in range(40)]
    for place in places:
        data[order(40)[place]] = dialogue("#%$", f"~^{place}|`\\{{}}=+")
    return job(base_job, policy, data, perDeviceTrainBatchSize=1, learningRate=1e-2, saveSteps=10)


def test_a_spike_is_skipped_and_a_lasting_one_ends_the_job(base_job: Job, tmp_path: Path) -> None:
    said: list[str] = []
    with guarded(open_stage(garbage(base_job, "skip", 30), tmp_path / "skip"), said) as trainer:
        trainer.train()
    assert len(said) == 1 and "step 31: the loss is " in said[0] and f": {order(40)[30]}; it is skipped" in said[0]
    said.clear()
    with guarded(open_stage(garbage(base_job, "fail", 30), tmp_path / "one"), said) as trainer:
        trainer.train()
    assert len(said) == 1 and "it is not skipped" in said[0]
    context = open_stage(garbage(base_job, "fail", 30, 31, 32, 33, 34), tmp_path / "five")
    with guarded(context, said) as trainer, pytest.raises(UserError, match="last of 5 bad steps in a row"):
        trainer.train()
    newest = max(int(path.name.partition("-")[2]) for path in context.output_dir.glob("checkpoint-*"))
    assert newest == 30, "nothing is saved while the numbers are bad"
