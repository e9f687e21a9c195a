"""Trainer callbacks of every stage: they report progress, publish checkpoints and stop on request."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_trainer.heartbeat import in_phase
from finetune_trainer.plan.steps import mfu
from finetune_trainer.progress.channel import CheckpointSaved
from finetune_trainer.progress.metrics_log import MetricsLog
from finetune_trainer.progress.reporter import Progress
from finetune_trainer.progress.throughput import Meter, Rates
from finetune_trainer.runtime import node_name
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.fencing import AttemptFence
from finetune_trainer.training.batches import Feed
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.deepspeed import repair_universal
from finetune_trainer.training.expert_load import expert_loads
from finetune_trainer.training.step_times import Spread, spread

if TYPE_CHECKING:
    from finetune_trainer.progress.channel import WorkerChannel
    from finetune_trainer.training.stage_trainer import StageTrainer
    from finetune_trainer.training.stage_work import StageWork

PROGRESS_STATE = "progress.json"
AGREE_SECONDS = 0.5
_REPORTED = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "total_flos"}


class ProgressCallback(TrainerCallback):
    """Counts, measures and reports each logged step. A resumed run continues the counters of its checkpoint."""

    def __init__(
        self, context: StageContext, collectives: Collectives, channel: WorkerChannel, work: StageWork
    ) -> None:
        self.context, self.collectives, self.channel, self.work = context, collectives, channel, work
        self.meter = Meter()
        self.rates = Rates(seconds=0.0)
        self.tokens, self.samples = 0, 0
        self.trainer: StageTrainer | None = None
        self.log_file: MetricsLog | None = None
        self.last: Progress | None = None
        self.loads: dict[str, float] = {}
        self.hosts: list[str] = []
        self.spread: Spread | None = None

    def state(self) -> dict[str, Any]:
        """Return the counters for a checkpoint."""
        assert self.trainer is not None
        guard = self.trainer.stage.guard
        return {
            "tokens": self.tokens,
            "samples": self.samples,
            "meter": self.meter.to_state(time.monotonic()),
            **({"guard": guard.state()} if guard is not None else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the counters of a checkpoint."""
        self.tokens, self.samples = state["tokens"], state["samples"]
        self.meter = Meter.from_state(state["meter"])
        if self.trainer is not None and self.trainer.stage.guard is not None:
            self.trainer.stage.guard.restore(state.get("guard", {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude a block from the training time."""
        self.meter.pause(time.monotonic())
        try:
            yield
        finally:
            self.meter.resume(time.monotonic())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.start(time.monotonic(), state.global_step, self.tokens, self.samples)
        self.hosts = self.collectives.gather(node_name())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a line of metrics: all workers take part in the counting, and rank 0 writes."""
        logs: dict[str, float] = kwargs["logs"]
        if "train_runtime" in logs:
            return
        is_training = "loss" in logs
        if is_training:
            self._count(state.global_step)
        if self.context.placement.rank == 0:
            self._report(state, logs, is_training)

    def _count(self, step: int) -> None:
        assert self.trainer is not None
        tokens, samples = self.collectives.sum(self.trainer.take_counts())
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        if self.trainer.stage.routing is not None:
            self.loads = expert_loads(self.trainer.stage.routing, self.collectives)
        self._compare_step_times()
        self.rates = self.meter.update(time.monotonic(), step, self.tokens, self.samples)

    def _compare_step_times(self) -> None:
        """Compare the step times of all workers. Every worker calls it."""
        assert self.trainer is not None
        if len(self.hosts) < 2 or self.trainer.stage.times is None:
            return
        own = self.trainer.stage.times.own()
        times = [seconds for (seconds,) in self.collectives.gather_numbers([math.nan if own is None else own])]
        self.spread = None if any(map(math.isnan, times)) else spread(times, self.hosts)

    def _report(self, state: TrainerState, logs: dict[str, float], is_training: bool) -> None:
        progress = self._progress(state, logs) if is_training else self._with_evaluation(state, logs)
        assert self.log_file is not None
        self.log_file.append(progress.to_json())
        self.channel.send(progress)
        self.last = progress

    def _with_evaluation(self, state: TrainerState, logs: dict[str, float]) -> Progress:
        metrics = evaluation_metrics(logs)
        base = self.last or self._progress(state, {})
        return replace(base, metrics=(base.metrics or {}) | metrics)

    def _progress(self, state: TrainerState, logs: dict[str, float]) -> Progress:
        rates, times, used = self.rates, self.spread, self.context.placement.usage()
        return Progress(
            stage=self.context.layout.index,
            stages=len(self.context.run.job.spec.stages),
            title=self.context.layout.title,
            step=state.global_step,
            total=state.max_steps,
            epoch=state.epoch,
            loss=_finite(logs.get("loss")),
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            tokens=self.tokens,
            samples=self.samples,
            tokens_per_second=rates.tokens_per_second,
            samples_per_second=rates.samples_per_second,
            mfu=self._mfu(rates.tokens_per_second or 0.0),
            memory=used.peak,
            memory_reserved=used.reserved,
            memory_context=used.context,
            memory_nccl=used.nccl,
            seconds=rates.seconds,
            eta=rates.eta(state.max_steps - state.global_step),
            step_seconds_median=None if times is None else times.median,
            step_seconds_max=None if times is None else times.most,
            slow_node=None if times is None else times.node,
            slow_factor=None if times is None else times.factor,
            metrics=self._metrics(logs) or None,
        )

    def _metrics(self, logs: dict[str, float]) -> dict[str, float]:
        return {name: float(value) for name, value in logs.items() if name not in _REPORTED} | self.loads

    def _mfu(self, tokens_per_second: float) -> float | None:
        work, workers = self.work, self.context.placement.world_size
        return mfu(work.flops_per_token, tokens_per_second, work.peak_flops, workers) if tokens_per_second else None


class CheckpointCallback(TrainerCallback):
    """Makes written checkpoints complete and deletes old ones."""

    def __init__(
        self,
        context: StageContext,
        store: CheckpointStore,
        collectives: Collectives,
        progress: ProgressCallback,
        feed: Feed,
    ) -> None:
        self.context, self.store, self.collectives = context, store, collectives
        self.progress, self.feed = progress, feed

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self.progress.paused(), in_phase("saving a checkpoint"):
            self.publish(state.global_step)

    def publish(self, step: int) -> None:
        """Publish a checkpoint. Every worker calls it once its own files are written.

        Raises:
            Interrupted: a later attempt has begun.
        """
        placement, directory = self.context.placement, self.store.local_directory(step)
        self.feed.save(step, directory)
        if placement.rank == 0:
            (directory / PROGRESS_STATE).write_text(json.dumps(self.progress.state()))
        self.collectives.barrier()
        if placement.local_rank == 0:
            self.store.push(step)
        self.collectives.barrier()
        if placement.rank == 0:
            self._complete(step)
        if placement.local_rank == 0:
            self.store.drop_copy(step)

    def _complete(self, step: int) -> None:
        if self.progress.log_file is not None:
            self.store.push_metrics(self.progress.log_file.path)
        AttemptFence(self.store.storage, self.context.run.attempt).check()
        self.store.publish(
            step,
            world_size=self.context.placement.world_size,
            zero=self.context.zero,
            rows_per_step=self.context.rows_per_step,
            shards=self.context.shards,
            data=asdict(self.context.data.key),
        )
        self.progress.channel.send(CheckpointSaved(self.context.layout.index, step))
        self.store.prune(self.context.spec.save_total_limit)


class StopCallback(TrainerCallback):
    """Stops at the end of a step, with a checkpoint, once the driver asks for it.

    All workers must stop at the same step, so they agree on it by a collective operation. To make it rare, each one
    also fixes the step of the next: the number of steps that take `AGREE_SECONDS` by the clock of rank 0, at least one.
    """

    def __init__(self, collectives: Collectives, channel: WorkerChannel, rank: int) -> None:
        self.collectives, self.channel, self.rank = collectives, channel, rank
        self.stopped = False
        self.next = 0
        self.agreed = 0, time.monotonic()
        """Step and time of the last agreement."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.next, self.agreed = state.global_step + 1, (state.global_step, time.monotonic())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < self.next:
            return
        own = [self.channel.stop_requested(), self._steps(state.global_step)] if self.rank == 0 else [0, 0]
        stop, steps = self.collectives.max(own)
        self.next = state.global_step + steps
        if stop and state.global_step < state.max_steps and not control.should_training_stop:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _steps(self, step: int) -> int:
        """Return the number of steps until the next agreement, from the rate of steps since the last one."""
        (before, then), now = self.agreed, time.monotonic()
        self.agreed = step, now
        return max(1, int(AGREE_SECONDS * (step - before) / max(now - then, 1e-9)))


class RepairOptimizerCallback(TrainerCallback):
    """Repairs the optimizer after a universal ZeRO-3 checkpoint was loaded."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        repair_universal(self.trainer.optimizer, self.trainer.stage.weight_decays)


class EpochCallback(TrainerCallback):
    """Sets the epoch of a collator whose masks depend on it."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


def _finite(loss: float | None) -> float | None:
    """Return the loss, or None if it is NaN because all its steps were skipped."""
    return loss if loss is not None and math.isfinite(loss) else None


def evaluation_metrics(logs: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation without its timings."""
    timings = ("_runtime", "_per_second", "_num_tokens")
    measured = [name for name in logs if name.startswith("eval_") and not name.endswith(timings)]
    return {name: float(logs[name]) for name in measured}
