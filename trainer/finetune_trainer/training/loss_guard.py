"""Handles steps with bad losses or gradients (`runPolicy.onBadLoss`), with the same decision on all workers.

A step is checked after its backward pass and before its update. The workers exchange their losses first, so that all of
them check the same numbers and make the same decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.heartbeat import enter_phase, in_phase
from finetune_trainer.training.bad_numbers import Finding, LossMonitor
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.dropped_steps import Dropped, DroppedSteps, RolledBack, format_rows
from finetune_trainer.training.row_numbers import RowNumbers
from finetune_trainer.training.stage_trainer import BACKWARD
from finetune_trainer.training.zero_updates import check_updates, clear_overflow

LASTING = 5
"""Consecutive bad steps after which a job fails that skips such steps, or that tolerates finite ones."""


@dataclass(frozen=True)
class _Losses:
    """The losses of all workers in one step."""

    mean: float
    not_finite: list[tuple[int, int]]
    """Rank and forward pass of each worker's first loss that is not finite."""


class LossGuard(TrainerCallback):
    """Checks each step of a stage's trainer, and handles bad ones by the job's policy.

    Training then raises UserError if the job fails because of bad numbers, or RolledBack if it returns to the last
    checkpoint.

    Args:
        context: the stage.
        collectives: collectives of the workers.
        dropped: the steps that earlier rollbacks have skipped.
        log: receives log lines on rank 0.
    """

    def __init__(
        self, context: StageContext, collectives: Collectives, dropped: DroppedSteps, log: Callable[[str], None]
    ) -> None:
        self.context, self.collectives, self.dropped, self.log = context, collectives, dropped, log
        self.policy = context.run.job.spec.run_policy.on_bad_loss
        spec = context.spec
        self.monitor = LossMonitor(spec.token_loss, spec.max_grad_norm, 0)
        self.numbers = RowNumbers(context)
        self.trainer: Any = None
        self.in_a_row = 0
        self.skipped = 0
        """Steps of this stage whose update was skipped, including earlier attempts."""
        self.unlogged = 0
        """Skipped steps since the last line of metrics."""
        self.logged_at = 0
        """Step of the last line of metrics."""
        self.withheld = False
        """Whether a checkpoint is due that was not written because of bad numbers."""
        self._first = 0
        """Steps done before this attempt. Its first step may take long, because it may compile."""
        self._losses: list[torch.Tensor] = []
        self._sum_before: torch.Tensor | None = None
        self._allowed: bool | None = None

    def attach(self, trainer: Any) -> None:
        """Check the steps of this trainer from now on."""
        self.trainer, trainer.stage.guard = trainer, self
        self.numbers.pairs = trainer.makes_pairs
        trainer.add_callback(self)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"judge": self.monitor.to_state(), "inARow": self.in_a_row, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, which is empty in those of older versions."""
        self.monitor.restore(state.get("judge", {}))
        self.in_a_row, self.skipped = state.get("inARow", 0), state.get("skipped", 0)

    # hooks of transformers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Record each loss, and check DeepSpeed's gradients, from now on."""
        self.monitor.warmup, self.logged_at = args.get_warmup_steps(state.max_steps), state.global_step
        accelerator = self.trainer.accelerator
        backward, self._first = accelerator.backward, state.global_step

        def watched(loss: torch.Tensor, **kwargs: Any) -> None:
            self._losses.append(loss.detach())
            step = self.trainer.state.global_step
            times = self.trainer.stage.times
            if times is not None and accelerator.sync_gradients:
                times.exchange()
            enter_phase("backward pass and its collectives", measured=step > self._first, step=step, order=BACKWARD)
            backward(loss, **kwargs)

        accelerator.backward = watched
        if (optimizer := self._zero_optimizer()) is not None:
            check_updates(optimizer, self._allows)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the sum of losses, to restore it if the step is skipped."""
        self._losses, self._allowed = [], None
        self._sum_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Withhold checkpoints while the numbers are bad, and write them afterwards."""
        if self.in_a_row and self.policy == "fail":
            self.withheld |= control.should_save
            control.should_save = False
        elif self.withheld:
            self.withheld, control.should_save = False, True

    def after_gradients(self, norm: Any, model: Any) -> None:
        """Check a step whose gradients are known, and skip its update if necessary."""
        allowed = self._allowed
        if allowed is None:
            scaler = getattr(self.trainer.accelerator, "scaler", None)
            value = None if norm is None else float(norm)
            # With float16 an infinite norm is a normal event: its scaler skips the update and reduces the scale.
            scaling = scaler is not None and value is not None and not math.isfinite(value)
            allowed = self._allows(None if scaling else value)
        if not allowed:
            model.zero_grad()  # AdamW skips weights without a gradient: neither weights nor moments change
            self.trainer._tr_loss.copy_(self._sum_before)
            if (optimizer := self._zero_optimizer()) is not None:
                clear_overflow(optimizer)

    def correct(self, logs: dict[str, float]) -> None:
        """Correct the loss in a line of metrics, which is transformers' mean over all steps since the last line.

        The corrected loss is the mean over the steps that were not skipped; NaN if all were. `skipped_steps` is the
        number of skipped steps of the stage.
        """
        step = self.trainer.state.global_step
        steps, trained = step - self.logged_at, step - self.logged_at - self.unlogged
        if self.unlogged:  # otherwise the loss stays the same, bit by bit
            logs["loss"] = logs["loss"] * steps / trained if trained > 0 else math.nan
        if self.skipped:
            logs["skipped_steps"] = float(self.skipped)
        self.logged_at, self.unlogged = step, 0

    def check_weights(self) -> None:
        """Refuse to save trained weights that are not finite.

        Every worker calls it before a checkpoint or a result is written.

        Raises:
            UserError, RolledBack: by the policy.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parts = (getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad)
        finite = [torch.isfinite(part.detach()).all() for part in parts if part.is_floating_point()]
        if self.collectives.any(bool(finite) and not bool(torch.stack(finite).all())):
            step = self.trainer.state.global_step - 1
            finding = Finding("trained weights are not finite after its update: they are not saved", finite=False)
            self._fail_or_roll_back(self._bad_step(step, finding.text))

    # the decision

    def _allows(self, norm: float | None) -> bool:
        """Whether the current step may update the model. All workers call it at the same time."""
        step = self.trainer.state.global_step
        # On a GPU a step waits here for its kernels, and spins if those of another worker never arrive.
        with in_phase("waiting for the step's losses", measured=step > self._first):
            losses = self._exchange_losses()
        if step in self.dropped.steps:
            self._allowed = False
            self._count_skip()
            return False
        finding = self.monitor.check(step, losses.mean, norm)
        self._allowed = finding is None or self._tolerates(finding, step, losses.not_finite)
        if finding is None:
            self.in_a_row = 0
        return self._allowed

    def _tolerates(self, finding: Finding, step: int, not_finite: list[tuple[int, int]]) -> bool:
        """Whether a bad step may update the model nevertheless: under the policy `fail`, a few finite ones may."""
        self.in_a_row += 1
        bad = self._bad_step(step, finding.text + self._describe_rows(step, not_finite))
        if self.policy == "rollback":
            self._fail_or_roll_back(bad)
        if self.in_a_row >= LASTING or (self.policy == "fail" and not finding.finite):
            more = "" if self.in_a_row == 1 else f", the last of {self.in_a_row} bad steps in a row"
            raise self._problem(bad, more)
        self.log(f"{bad.message}; it {'is not skipped' if self.policy == 'fail' else 'is skipped'}")
        if self.policy == "skip":
            self._count_skip()
        return self.policy == "fail"

    def _fail_or_roll_back(self, bad: Dropped) -> None:
        if self.policy != "rollback":
            raise self._problem(bad, "")
        newest = self.dropped.newest()
        if bad.step in self.dropped.steps or self.dropped.exhausted(newest):
            raise self._problem(bad, f"; rollbacks to step {newest} did not help: {self.dropped.describe(newest)}")
        self.collectives.barrier()  # all workers have read the file before rank 0 writes it
        if self.context.placement.rank == 0:
            self.dropped.add(bad, newest)
        self.collectives.barrier()
        raise RolledBack(f"{bad.message}; rolled back to step {newest}, and the update of this step is skipped")

    def _count_skip(self) -> None:
        self.skipped += 1
        self.unlogged += 1

    def _problem(self, bad: Dropped, more: str) -> UserError:
        rate = self.context.spec.learning_rate
        advice = f"look at these rows; or try {rate / 10:g} (it is {rate:g}), more warm-up or a lower maxGradNorm"
        if self.policy == "fail":
            advice += "; or set runPolicy.onBadLoss to skip or rollback"
        return UserError([Problem(f"{self.context.where}.learningRate", f"{bad.message}{more}: {advice}")])

    def _bad_step(self, step: int, why: str) -> Dropped:
        return Dropped(step, self.numbers.in_sources(self.trainer.rows_of(step)), self.numbers.data, why)

    def _describe_rows(self, step: int, not_finite: list[tuple[int, int]]) -> str:
        """Return the rows of the forward passes whose loss is not finite, for a message."""
        texts = []
        for rank, number in not_finite:
            rows = self.numbers.in_sources(self.trainer.rows_of(step, rank, number))
            texts.append(f"worker {rank}, forward pass {number + 1}: rows {format_rows(rows)}")
        return f" ({'; '.join(texts)})" if texts else ""

    def _exchange_losses(self) -> _Losses:
        own = torch.stack([loss.float() for loss in self._losses]).tolist() if self._losses else [0.0]
        bad = next((number for number, loss in enumerate(own) if not math.isfinite(loss)), -1)
        gathered = self.collectives.gather_numbers([sum(own), float(bad)])
        not_finite = [(rank, int(number)) for rank, (_, number) in enumerate(gathered) if number >= 0]
        return _Losses(sum(loss for loss, _ in gathered) / len(gathered), not_finite)

    def _zero_optimizer(self) -> Any:
        """Return DeepSpeed's ZeRO optimizer if its updates can be skipped; None without DeepSpeed."""
        engine = getattr(self.trainer.accelerator, "deepspeed_engine_wrapped", None)
        optimizer = getattr(getattr(engine, "engine", None), "optimizer", None)
        return optimizer if hasattr(optimizer, "_update_scale") else None
