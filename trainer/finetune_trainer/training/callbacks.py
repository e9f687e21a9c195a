"""What happens beside training: progress told, checkpoints published, the wish to stop heard."""

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
from finetune_trainer.training.deepspeed import mend_universal
from finetune_trainer.training.expert_load import expert_loads
from finetune_trainer.training.step_times import Spread, spread

if TYPE_CHECKING:
    from finetune_trainer.progress.channel import WorkerChannel
    from finetune_trainer.training.stage_trainer import StageTrainer
    from finetune_trainer.training.stage_work import StageWork

PROGRESS_STATE = "progress.json"
ASK_SECONDS = 0.5
_KNOWN = {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens", "total_flos"}


class ProgressCallback(TrainerCallback):
    """Counts, measures and tells each logged step. Counters go on where a resumed run's checkpoint left them."""

    def __init__(self, context: StageContext, collectives: Collectives, end: WorkerChannel, work: StageWork) -> None:
        self.context, self.collectives, self.end, self.work = context, collectives, end, work
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
        """What a checkpoint keeps of the counters."""
        assert self.trainer is not None
        guard = self.trainer.stage.guard
        return {
            "tokens": self.tokens,
            "samples": self.samples,
            "meter": self.meter.to_state(time.monotonic()),
            **({"guard": guard.state()} if guard is not None else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's counters."""
        self.tokens, self.samples = state["tokens"], state["samples"]
        self.meter = Meter.from_state(state["meter"])
        if self.trainer is not None and self.trainer.stage.guard is not None:
            self.trainer.stage.guard.restore(state.get("guard", {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        self.meter.pause(time.monotonic())
        try:
            yield
        finally:
            self.meter.resume(time.monotonic())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.start(time.monotonic(), state.global_step, self.tokens, self.samples)
        self.hosts = self.collectives.gather(node_name())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """One line of metrics; every worker takes part in the counting, the first one writes."""
        if "train_runtime" in logs:
            return
        trains = "loss" in logs
        if trains:
            self._count(state.global_step)
        if self.context.placement.rank == 0:
            self._tell(state, logs, trains)

    def _count(self, step: int) -> None:
        assert self.trainer is not None
        tokens, samples = self.collectives.sum(self.trainer.take_counts())
        self.tokens, self.samples = self.tokens + tokens, self.samples + samples
        if self.trainer.stage.routing is not None:
            self.loads = expert_loads(self.trainer.stage.routing, self.collectives)
        self._compare()
        self.rates = self.meter.update(time.monotonic(), step, self.tokens, self.samples)

    def _compare(self) -> None:
        """Compare the workers' own times of a step; every worker takes part."""
        assert self.trainer is not None
        if len(self.hosts) < 2 or self.trainer.stage.times is None:
            return
        own = self.trainer.stage.times.own()
        found = [seconds for (seconds,) in self.collectives.gather_numbers([math.nan if own is None else own])]
        self.spread = None if any(map(math.isnan, found)) else spread(found, self.hosts)

    def _tell(self, state: TrainerState, logs: dict[str, float], trains: bool) -> None:
        progress = self._progress(state, logs) if trains else self._with_evaluation(state, logs)
        assert self.log_file is not None
        self.log_file.append(progress.to_json())
        self.end.send(progress)
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
        return {name: float(value) for name, value in logs.items() if name not in _KNOWN} | self.loads

    def _mfu(self, tokens_per_second: float) -> float | None:
        work, workers = self.work, self.context.placement.world_size
        return mfu(work.flops_per_token, tokens_per_second, work.peak_flops, workers) if tokens_per_second else None


class CheckpointCallback(TrainerCallback):
    """Makes a written checkpoint complete, and deletes older ones."""

    def __init__(
        self,
        context: StageContext,
        store: CheckpointStore,
        collectives: Collectives,
        progress: ProgressCallback,
        feed: Feed,
    ) -> None:
        self.context, self.store, self.collectives, self.progress, self.feed = (
            context,
            store,
            collectives,
            progress,
            feed,
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self.progress.paused(), in_phase("saving a checkpoint"):
            self.publish(state.global_step)

    def publish(self, step: int) -> None:
        """Called by every worker once its own files are written."""
        placement, place = self.context.placement, self.store.place(step)
        self.feed.save(step, place)
        if placement.rank == 0:
            (place / PROGRESS_STATE).write_text(json.dumps(self.progress.state()))
        self.collectives.barrier()
        if placement.local_rank == 0:
            self.store.push(step)
        self.collectives.barrier()
        if placement.rank == 0:
            if self.progress.log_file is not None:
                self.store.push_metrics(self.progress.log_file.path)
            AttemptFence(self.store.storage, self.context.run.attempt).check()
            self.store.publish(
                step,
                world_size=placement.world_size,
                zero=self.context.zero,
                rows_per_step=self.context.rows_per_step,
                shards=self.context.shards,
                data=asdict(self.context.data.key),
            )
            self.progress.end.send(CheckpointSaved(self.context.layout.index, step))
            self.store.prune(self.context.spec.save_total_limit)
        if placement.local_rank == 0:
            self.store.drop_copy(step)


class StopCallback(TrainerCallback):
    """Stops at a step's end, with a checkpoint, once the driver asks for it.

    All workers must stop at the same step, so they agree on it. They do so after as many steps as take `ASK_SECONDS`
    by the first worker's clock (one, where a step takes longer), at steps that they agreed on before.
    """

    def __init__(self, collectives: Collectives, end: WorkerChannel, rank: int) -> None:
        self.collectives, self.end, self.rank = collectives, end, rank
        self.stopped = False
        self.next = 0
        self.asked = 0, time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.next, self.asked = state.global_step + 1, (state.global_step, time.monotonic())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < self.next:
            return
        mine = [self.end.stop_requested(), self._steps(state.global_step)] if self.rank == 0 else [0, 0]
        wish, steps = self.collectives.max(mine)
        self.next = state.global_step + steps
        if wish and state.global_step < state.max_steps and not control.should_training_stop:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _steps(self, step: int) -> int:
        """Steps until the workers agree again, from the pace since they last did."""
        (before, then), now = self.asked, time.monotonic()
        self.asked = step, now
        return max(1, int(ASK_SECONDS * (step - before) / max(now - then, 1e-9)))


class MendCallback(TrainerCallback):
    """Mends the optimizer after a universal ZeRO-3 checkpoint was loaded."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        mend_universal(self.trainer.optimizer, self.trainer.stage.weight_decays)


class EpochCallback(TrainerCallback):
    """Tells a collator that masks by epoch which one begins."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


def _finite(loss: float | None) -> float | None:
    """None for the loss of steps none of which was trained on."""
    return loss if loss is not None and math.isfinite(loss) else None


def evaluation_metrics(logs: dict[str, float]) -> dict[str, float]:
    """What an evaluation measured, its own timings left out."""
    timings = ("_runtime", "_per_second", "_num_tokens")
    measured = [name for name in logs if name.startswith("eval_") and not name.endswith(timings)]
    return {name: float(logs[name]) for name in measured}
