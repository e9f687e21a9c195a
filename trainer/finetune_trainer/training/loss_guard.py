"""What a job does about bad numbers (`runPolicy.onBadLoss`): the judgement of each step, the same on all workers.

A step is judged after its gradients are known and before its update. The workers exchange their losses first, so that
all of them judge the same numbers and come to the same decision.
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
from finetune_trainer.heartbeat import during, enter
from finetune_trainer.training.bad_numbers import Finding, Judge
from finetune_trainer.training.collectives import Peers
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.dropped_steps import Dropped, DroppedSteps, RolledBack, shown
from finetune_trainer.training.row_numbers import RowNumbers
from finetune_trainer.training.stage_trainer import BACKWARD
from finetune_trainer.training.zero_updates import forget_overflow, judge_updates

LASTING = 5
"""Bad steps in a row after which a job ends that skips such steps, or that tolerates bad numbers that are finite."""


@dataclass(frozen=True)
class _Losses:
    """The losses of one step, of all workers."""

    mean: float
    suspects: list[tuple[int, int]]
    """Worker and forward pass, for each worker's first loss that is not finite."""


class LossGuard(TrainerCallback):
    """Judges each step of a stage's trainer, and does with a bad one what the job says.

    Args:
        dropped: the steps that earlier rollbacks have left out.
        say: receives a line for people, on the first worker.

    Raises:
        UserError: from training, where the job ends because of bad numbers.
        RolledBack: from training, where it goes back to the last checkpoint.
    """

    def __init__(self, context: StageContext, peers: Peers, dropped: DroppedSteps, say: Callable[[str], None]) -> None:
        self.context, self.peers, self.dropped, self.say = context, peers, dropped, say
        self.policy = context.run.job.spec.run_policy.on_bad_loss
        spec = context.spec
        self.judge = Judge(spec.token_loss, spec.max_grad_norm, 0)
        self.numbers = RowNumbers(context)
        self.trainer: Any = None
        self.in_a_row = 0
        self.skipped = 0
        """Steps of this stage whose update was dropped, those of earlier attempts included."""
        self.unlogged = 0
        """Of these, the ones since the last line of metrics."""
        self.logged_at = 0
        """The step of that line."""
        self.withheld = False
        """Whether a checkpoint is due that was not written while the numbers were bad."""
        self._first = 0
        """The step that training began after; the first one may compile for long."""
        self._losses: list[torch.Tensor] = []
        self._sum_before: torch.Tensor | None = None
        self._judged: bool | None = None

    def attach(self, trainer: Any) -> None:
        """Judge the steps of this trainer."""
        self.trainer, trainer.stage.guard = trainer, self
        self.numbers.pairs = trainer.makes_pairs
        trainer.add_callback(self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {"judge": self.judge.to_state(), "inARow": self.in_a_row, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; an older version's has no such state."""
        self.judge.restore(state.get("judge", {}))
        self.in_a_row, self.skipped = state.get("inARow", 0), state.get("skipped", 0)

    # where transformers calls

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at each loss, and at DeepSpeed's gradients, from here on."""
        self.judge.warmup, self.logged_at = args.get_warmup_steps(state.max_steps), state.global_step
        accelerator = self.trainer.accelerator
        backward, self._first = accelerator.backward, state.global_step

        def watched(loss: torch.Tensor, **kwargs: Any) -> None:
            self._losses.append(loss.detach())
            step = self.trainer.state.global_step
            times = self.trainer.stage.times
            if times is not None and accelerator.sync_gradients:
                times.exchange()
            enter("backward pass and its collectives", measured=step > self._first, step=step, order=BACKWARD)
            backward(loss, **kwargs)

        accelerator.backward = watched
        if (optimizer := self._zero_optimizer()) is not None:
            judge_updates(optimizer, self._allows)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remember the sum of losses, to which a dropped step adds nothing."""
        self._losses, self._judged = [], None
        self._sum_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write no checkpoint while finite numbers are bad, and make up for it afterwards."""
        if self.in_a_row and self.policy == "fail":
            self.withheld |= control.should_save
            control.should_save = False
        elif self.withheld:
            self.withheld, control.should_save = False, True

    def after_gradients(self, norm: Any, model: Any) -> None:
        """Judge a step whose gradients are known, and drop its update where it is to be dropped."""
        allowed = self._judged
        if allowed is None:
            scaler = getattr(self.trainer.accelerator, "scaler", None)
            value = None if norm is None else float(norm)
            # With float16 an infinite norm is a normal event: its scaler leaves the update out and scales less.
            scaling = scaler is not None and value is not None and not math.isfinite(value)
            allowed = self._allows(None if scaling else value)
        if not allowed:
            model.zero_grad()  # AdamW skips weights without a gradient: neither they nor its moments change
            self.trainer._tr_loss.copy_(self._sum_before)
            if (optimizer := self._zero_optimizer()) is not None:
                forget_overflow(optimizer)

    def correct(self, logs: dict[str, float]) -> None:
        """Make a line's loss, transformers' mean over all steps since the last line, the mean over those that were
        trained on; NaN where each of them was dropped. Count the dropped steps of the stage in `skipped_steps`."""
        step = self.trainer.state.global_step
        steps, trained = step - self.logged_at, step - self.logged_at - self.unlogged
        if self.unlogged:  # else it stays as it is, to the bit
            logs["loss"] = logs["loss"] * steps / trained if trained > 0 else math.nan
        if self.skipped:
            logs["skipped_steps"] = float(self.skipped)
        self.logged_at, self.unlogged = step, 0

    def check_weights(self) -> None:
        """Refuse to save a ruined model. Every worker calls it before a checkpoint or a result is written.

        Raises:
            UserError, RolledBack: trained weights are not finite.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parts = (getattr(weight, "ds_tensor", weight) for weight in model.parameters() if weight.requires_grad)
        sound = [torch.isfinite(part.detach()).all() for part in parts if part.is_floating_point()]
        if self.peers.any(bool(sound) and not bool(torch.stack(sound).all())):
            step = self.trainer.state.global_step - 1
            finding = Finding("trained weights are not finite after its update: they are not saved", finite=False)
            self._give_up_or_roll_back(self._dropped(step, finding.text))

    # the decision

    def _allows(self, norm: float | None) -> bool:
        """Whether the step at hand may update the model. All workers call it at the same time."""
        step = self.trainer.state.global_step
        # On a GPU this is where a step waits for its kernels, and spins where those of another worker never come.
        with during("waiting for the step's losses", measured=step > self._first):
            losses = self._exchanged()
        if step in self.dropped.steps:
            self._judged = False
            self._count_skip()
            return False
        finding = self.judge.finding(step, losses.mean, norm)
        self._judged = finding is None or self._tolerated(finding, step, losses.suspects)
        if finding is None:
            self.in_a_row = 0
        return self._judged

    def _tolerated(self, finding: Finding, step: int, suspects: list[tuple[int, int]]) -> bool:
        """Whether a bad step trains the model all the same: where it is finite, does not last and is to be told."""
        self.in_a_row += 1
        found = self._dropped(step, finding.text + self._named(step, suspects))
        if self.policy == "rollback":
            self._give_up_or_roll_back(found)
        if self.in_a_row >= LASTING or (self.policy == "fail" and not finding.finite):
            more = "" if self.in_a_row == 1 else f", the last of {self.in_a_row} bad steps in a row"
            raise self._problem(found, more)
        verb = "is trained on all the same" if self.policy == "fail" else "is skipped"
        self.say(f"{found.words}; it {verb}")
        if self.policy == "skip":
            self._count_skip()
        return self.policy == "fail"

    def _give_up_or_roll_back(self, found: Dropped) -> None:
        if self.policy != "rollback":
            raise self._problem(found, "")
        newest = self.dropped.newest()
        if found.step in self.dropped.steps or self.dropped.exhausted(newest):
            raise self._problem(found, f"; rollbacks to step {newest} did not help: {self.dropped.told(newest)}")
        self.peers.wait()  # all have looked before one writes
        if self.context.placement.rank == 0:
            self.dropped.add(found, newest)
        self.peers.wait()
        raise RolledBack(f"{found.words}; rolled back to step {newest}, and the update of this step is left out")

    def _count_skip(self) -> None:
        self.skipped += 1
        self.unlogged += 1

    def _problem(self, found: Dropped, more: str) -> UserError:
        rate = self.context.spec.learning_rate
        advice = f"look at these rows; or try {rate / 10:g} (it is {rate:g}), more warm-up or a lower maxGradNorm"
        if self.policy == "fail":
            advice += "; or set runPolicy.onBadLoss to skip or rollback"
        return UserError([Problem(f"{self.context.where}.learningRate", f"{found.words}{more}: {advice}")])

    def _dropped(self, step: int, why: str) -> Dropped:
        return Dropped(step, self.numbers.of(self.trainer.rows_of(step)), self.numbers.data, why)

    def _named(self, step: int, suspects: list[tuple[int, int]]) -> str:
        """The rows of the forward passes whose loss is not finite."""
        texts = []
        for rank, number in suspects:
            rows = self.numbers.of(self.trainer.rows_of(step, rank, number))
            texts.append(f"worker {rank}, forward pass {number + 1}: rows {shown(rows)}")
        return f" ({'; '.join(texts)})" if texts else ""

    def _exchanged(self) -> _Losses:
        mine = torch.stack([loss.float() for loss in self._losses]).tolist() if self._losses else [0.0]
        bad = next((number for number, loss in enumerate(mine) if not math.isfinite(loss)), -1)
        everyone = self.peers.numbers([sum(mine), float(bad)])
        suspects = [(rank, int(number)) for rank, (_, number) in enumerate(everyone) if number >= 0]
        return _Losses(sum(loss for loss, _ in everyone) / len(everyone), suspects)

    def _zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer, where its updates can be left out; None without DeepSpeed."""
        engine = getattr(self.trainer.accelerator, "deepspeed_engine_wrapped", None)
        optimizer = getattr(getattr(engine, "engine", None), "optimizer", None)
        return optimizer if hasattr(optimizer, "_update_scale") else None
