"""Trained stages on one worker: build, resume from wherever storage says the stage stands, train, save."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from finetune_api.runconfig import RunConfig
from finetune_trainer.data import eval_prompts
from finetune_trainer.doctor.nccl_log import Transport
from finetune_trainer.errors import Interrupted
from finetune_trainer.gate import require_gate
from finetune_trainer.heartbeat import enter, pulse
from finetune_trainer.launch.failures import placed
from finetune_trainer.launch.same_data import compare_data
from finetune_trainer.launch.sharing.node_files import NodeFiles, count_nodes
from finetune_trainer.launch.stack_dumps import answer_signals
from finetune_trainer.launch.stage_context import stage_context
from finetune_trainer.launch.work_order import WorkOrder
from finetune_trainer.layout import METRICS
from finetune_trainer.model.composite import frozen_note
from finetune_trainer.model.load_notes import loading_notes
from finetune_trainer.progress.channel import Event, StageBegun, StageDone, TransportFound, Waiting, WorkerEnd
from finetune_trainer.progress.heartbeats import PulseThread, place_of
from finetune_trainer.progress.metrics_log import MetricsLog
from finetune_trainer.runtime import node_name
from finetune_trainer.stage_graph import layouts, scratch, waits_for
from finetune_trainer.stages import make_trainer, perform
from finetune_trainer.storage.checkpoints import CheckpointStore, Manifest
from finetune_trainer.storage.fencing import Hold
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.storage.retry import listen
from finetune_trainer.storage.universal_checkpoint import SUFFIX, to_universal
from finetune_trainer.training.callbacks import (
    PROGRESS_STATE,
    CheckpointCallback,
    MendCallback,
    ProgressCallback,
    StopCallback,
    evaluation_metrics,
)
from finetune_trainer.training.collectives import Peers
from finetune_trainer.training.context import Placement, ResumePoint, StageContext
from finetune_trainer.training.deepspeed import join_process_group, set_group_timeout
from finetune_trainer.training.dropped_steps import DroppedSteps
from finetune_trainer.training.expert_load import watch_routing
from finetune_trainer.training.loss_guard import LossGuard
from finetune_trainer.training.memory import context_bytes, reset_peaks
from finetune_trainer.training.packing_check import PackingCheck
from finetune_trainer.training.reset_state import forget_stage, release
from finetune_trainer.training.samples import SamplesCallback
from finetune_trainer.training.stage_io import StageTools
from finetune_trainer.training.stage_result import adapter_note, save_result
from finetune_trainer.training.stage_work import StageWork
from finetune_trainer.training.step_times import StepTimes
from finetune_trainer.training.transport import TransportCallback

LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed", "ray", "datasets", "bitsandbytes")
SAMPLE_PROMPTS = 4


def run_stages(order: WorkOrder) -> None:
    """See `launch.worker.train_loop`."""
    torch.set_num_threads(order.threads)
    run = RunConfig.model_validate_json(order.run)
    if run.work_dir is not None:
        os.chdir(run.work_dir)  # Ray starts workers in its own directory, where relative paths lead nowhere
    storage, end, placement = Storage(run.root), WorkerEnd(order.channel), _placement(order.accelerator)
    listen(lambda text: end.send(Waiting(text)))
    answer_signals()
    node = ray.get_runtime_context().get_node_id()
    with PulseThread(place_of(placement.rank, placement.world_size, node_name(), node), pulse(), end.beat):
        set_group_timeout(run.job.spec.run_policy.ddp_timeout)
        peers = Peers(node_name(), run.job.spec.run_policy.loading_timeout_seconds)
        files = NodeFiles(run, storage, placement, peers, count_nodes(peers), end.send)
        enter("fetching the prepared data and the weights")
        files.receive(order.offer)
        peers.meet("its node has the prepared data and the weights")
        for work in order.stages:
            _run_stage(order, work, run, storage, end, placement, files)


def _run_stage(
    order: WorkOrder,
    work: StageWork,
    run: RunConfig,
    storage: Storage,
    end: WorkerEnd,
    placement: Placement,
    files: NodeFiles,
) -> None:
    """Run one stage that is not done; Ray may have changed the number of workers and started them again."""
    if not storage.exists(layouts(run)[work.index].done):
        join_process_group(work.zero, placement.accelerator)
        tell = end.send if placement.rank == 0 else _nobody
        tell(StageBegun(work.index, placement.world_size))
        reset_peaks(placement.accelerator)
        enter("preparing the stage's data", step=0, order=0)
        context = stage_context(run, work, order.threads, placement, storage, files)
        files.peers.meet("its data is loaded")
        StageRun(context, storage, end, files.peers, work, several_nodes=files.nodes > 1).train()
        tell(StageDone(work.index))
        forget_stage()
    require_gate(run, storage, work.index)


def _nobody(event: Event) -> None:
    """Only the first worker speaks."""


@dataclass(frozen=True)
class _Callbacks:
    progress: ProgressCallback
    checkpoint: CheckpointCallback
    stop: StopCallback
    samples: SamplesCallback


class StageRun:
    """Ties a stage's trainer to storage, to the other workers and to the driver."""

    def __init__(
        self,
        context: StageContext,
        storage: Storage,
        end: WorkerEnd,
        peers: Peers,
        work: StageWork,
        several_nodes: bool = False,
    ) -> None:
        self.context, self.storage, self.end, self.peers, self.work = context, storage, end, peers, work
        self.first = context.placement.rank == 0
        self.scratch = scratch(context.run, context.layout.index)
        self.store = CheckpointStore(storage, context.layout, self.scratch)
        self.frozen: str | None = None
        self.several_nodes = several_nodes
        self.transport: dict[str, str] = {}

    def train(self) -> None:
        """Run the stage to its end, or to where it is asked to stop."""
        if not self.context.spec.trains:
            with placed(self.context.layout.index):
                self._perform()
            return
        started = time.monotonic()
        self._tell_changes()
        resumed = self._resume_point()
        self.context = replace(self.context, resumed=resumed)
        enter("loading the model")
        trainer = make_trainer(self.context)
        self.peers.meet("its model is loaded")
        trainer.args.eval_on_start = resumed is None and self.context.data.eval is not None
        callbacks = self._attach(trainer, resumed)
        self._log(f"model ready after {time.monotonic() - started:.1f} s")
        self.frozen = frozen_note(trainer.model)
        if self.frozen:
            self._log(self.frozen)
        with placed(self.context.layout.index, trainer):
            enter("preparing to train")
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.directory))
            self._tidy(resumed)
            if callbacks.stop.stopped:
                raise Interrupted(f"stopped at step {trainer.state.global_step}, checkpoint saved")
            self._finish(trainer, callbacks)
        release(trainer)

    def _perform(self) -> None:
        """A stage that takes no optimizer steps."""
        tools = StageTools(self.context, self.storage, self.peers, self.end, self.scratch)
        self._tell_changes()
        metrics = perform(self.context, tools)
        if self.first:
            if self.context.prepared is not None:
                self._publish_data_report()
            self._write_done(0, time.monotonic() - tools.started, 0, metrics)
        self.peers.wait()

    def _tell_changes(self) -> None:
        """Log what is changed of the saved model that the stage starts from as it loads."""
        context = self.context
        if self.first:
            for note in loading_notes(context.source, context.job_model, context.spec.task):
                self._log(note)

    def _resume_point(self) -> ResumePoint | None:
        """The newest complete checkpoint, on this machine; what a killed run left half-written is deleted.

        Raises:
            UserError: it was trained on other rows.
        """
        newest = self.store.newest()
        self.peers.wait()
        if self.first:
            self.store.clean()
        if self.context.placement.local_rank == 0 and not self.storage.is_local:
            shutil.rmtree(self.scratch, ignore_errors=True)  # an earlier attempt's files belong to no checkpoint now
        self.peers.wait()
        if newest is None:
            return None
        compared = compare_data(self.context.run, self.context.layout.index, newest, self.context.data.key)
        self._log(f"resumes at step {newest.step} from its last checkpoint")
        if list(waits_for(self.context.run, self.context.layout.index)):  # else the driver has told it
            for note in compared.notes:
                self._log(note)
        return replace(self._fetch(newest), other_rows=compared.other_rows)

    def _fetch(self, newest: Manifest) -> ResumePoint:
        """The checkpoint in a form that as many workers as there are can read."""
        placement, place = self.context.placement, self.store.place(newest.step)
        universal = self.context.zero > 0 and newest.world_size != placement.world_size
        converted = self.scratch / f"{place.name}{SUFFIX}"
        if placement.local_rank == 0:
            self.store.fetch(newest.step)
            if universal:
                to_universal(place, converted)
        if newest.world_size != placement.world_size:
            rows = f"{self.context.rows_per_step} rows per step, as before"
            self._log(f"{newest.world_size} workers wrote it and {placement.world_size} go on, with {rows}")
        self.peers.wait()
        return ResumePoint(newest.step, converted if universal else place, universal)

    def _tidy(self, resumed: ResumePoint | None) -> None:
        """Delete copies of the checkpoint that the stage went on from."""
        if resumed is None or self.context.placement.local_rank != 0:
            return
        self.store.drop_copy(resumed.step)
        if resumed.universal:
            shutil.rmtree(resumed.directory, ignore_errors=True)

    def _attach(self, trainer: Any, resumed: ResumePoint | None) -> _Callbacks:
        progress = ProgressCallback(self.context, self.peers, self.end, self.work)
        progress.trainer, trainer.stage.paused = trainer, progress.paused
        trainer.stage.times = StepTimes(self.context.placement.accelerator)
        trainer.stage.times.leave_out(trainer.accelerator)
        LossGuard(self.context, self.peers, DroppedSteps(self.store), self._log).attach(trainer)
        trainer.stage.routing = watch_routing(trainer.model)
        trainer.stage.tools = StageTools(self.context, self.storage, self.peers, self.end, self.scratch)
        if self.first:
            self._fetch_metrics()
            progress.log_file = MetricsLog(self._metrics_path())
        if resumed is not None:
            progress.restore(json.loads((resumed.directory / PROGRESS_STATE).read_text()))
            if resumed.universal and self.context.zero == 3:
                trainer.add_callback(MendCallback(trainer))
        callbacks = _Callbacks(
            progress,
            CheckpointCallback(self.context, self.store, self.peers, progress, trainer.stage.feed),
            StopCallback(self.peers, self.end, self.context.placement.rank),
            SamplesCallback(self.context, self.storage, _prompts(self.context), self.peers),
        )
        if self.context.placement.accelerator and self.several_nodes:
            trainer.add_callback(TransportCallback(self.peers, self.context.run.job, self._tell_transport))
        for callback in (callbacks.samples, callbacks.stop, callbacks.checkpoint, callbacks.progress):
            trainer.add_callback(callback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PackingCheck):
                callback.say = self._log
        return callbacks

    def _finish(self, trainer: Any, callbacks: _Callbacks) -> None:
        """Save the last checkpoint, measure, save the result, and only then call the stage done."""
        enter("saving the result")
        trainer.stage.guard.check_weights()
        step = trainer.state.global_step
        if trainer.stage.keeps_last and self.peers.any(self.first and self.store.manifest(step) is None):
            trainer._save_checkpoint(trainer.model, None)
            callbacks.checkpoint.publish(step)
        metrics = {} if self.context.data.eval is None else evaluation_metrics(trainer.evaluate())
        metrics |= trainer.final_metrics()
        callbacks.samples.after(trainer.model)
        result = self._result()
        save_result(trainer, self.context, result)
        if self.first:
            if (note := adapter_note(self.context, result)) is not None:
                self._log(note)
            self._publish(result)
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            metrics = ({"loss": losses[-1]} if losses else {}) | metrics
            self._write_done(step, callbacks.progress.rates.seconds, callbacks.progress.tokens, metrics)
        self.peers.wait()

    def _result(self) -> Path:
        return self.storage.local(self.context.layout.result) or self.scratch / "result"

    def _publish(self, result: Path) -> None:
        self._publish_data_report()
        if not self.storage.is_local:
            self.storage.upload(result, self.context.layout.result)
            if self._metrics_path().exists():
                self.store.push_metrics(self._metrics_path())

    def _publish_data_report(self) -> None:
        report = json.dumps(self.context.data.report.to_json(), indent=1)
        self.storage.write_text(self.context.layout.data_report, report)

    def _write_done(self, steps: int, seconds: float, tokens: int, metrics: dict[str, float]) -> None:
        Hold(self.storage, self.context.run.attempt).check()
        done = {
            "steps": steps,
            "seconds": seconds,
            "tokens": tokens,
            "metrics": metrics,
            "world_size": self.context.placement.world_size,
            "zero": self.context.zero,
            "memory": self.context.placement.usage().to_json(),
            "environment": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }
        done |= {"frozen": self.frozen} if self.frozen else {}
        done |= {"transport": self.transport} if self.transport else {}
        self.storage.write_text(self.context.layout.done, json.dumps(done, indent=1))

    def _fetch_metrics(self) -> None:
        """The curve so far, which another pod may have drawn."""
        if not self.storage.is_local and self.storage.exists(self.context.layout.metrics):
            self._metrics_path().parent.mkdir(parents=True, exist_ok=True)
            self._metrics_path().write_bytes(self.storage.read_bytes(self.context.layout.metrics))

    def _metrics_path(self) -> Path:
        return self.storage.local(self.context.layout.metrics) or self.scratch / METRICS

    def _tell_transport(self, found: Transport, warning: str) -> None:
        if self.first:
            self.transport = {"words": found.words, "warning": warning}
            self.end.send(TransportFound(found.network, found.gpu_direct, found.words, warning))

    def _log(self, line: str) -> None:
        if self.first:
            self.end.send(f"{self.context.layout.title}: {line}")


def _placement(accelerator: bool) -> Placement:
    place = ray.train.get_context()
    ranks = place.get_world_rank(), place.get_local_rank(), place.get_world_size()
    return Placement(*ranks, accelerator, context_bytes(accelerator))


def _prompts(context: StageContext) -> list[dict[str, Any]]:
    """Prompts to sample with; masked models and reward models answer none."""
    spec = context.spec
    if spec.task != "causal":
        return []
    return eval_prompts(spec, Path(context.run.base_dir), Path(context.run.cache_dir), SAMPLE_PROMPTS)
