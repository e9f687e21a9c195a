"""Runs the trained stages of a job on one worker: load, resume, train, save."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
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
from finetune_trainer.heartbeat import enter_phase, process_heartbeat
from finetune_trainer.launch.failures import errors_with_step
from finetune_trainer.launch.sharing.node_files import NodeFiles, count_nodes
from finetune_trainer.launch.stack_dumps import answer_inquiries
from finetune_trainer.launch.stage_context import stage_context
from finetune_trainer.launch.stage_output import StageOutput
from finetune_trainer.launch.stage_resume import StageResume
from finetune_trainer.launch.work_order import WorkOrder
from finetune_trainer.model.composite import frozen_note
from finetune_trainer.model.load_notes import loading_notes
from finetune_trainer.progress.channel import Event, StageBegun, StageDone, TransportFound, Waiting, WorkerChannel
from finetune_trainer.progress.heartbeats import HeartbeatThread, first_heartbeat
from finetune_trainer.progress.metrics_log import MetricsLog
from finetune_trainer.runtime import node_name
from finetune_trainer.stage_graph import layouts, scratch
from finetune_trainer.stages import make_trainer, perform
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.storage.retry import on_waiting
from finetune_trainer.training.callbacks import (
    PROGRESS_STATE,
    CheckpointCallback,
    ProgressCallback,
    RepairOptimizerCallback,
    StopCallback,
    evaluation_metrics,
)
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import Placement, ResumePoint, StageContext
from finetune_trainer.training.deepspeed import join_process_group, set_group_timeout
from finetune_trainer.training.dropped_steps import DroppedSteps
from finetune_trainer.training.expert_load import watch_routing
from finetune_trainer.training.loss_guard import LossGuard
from finetune_trainer.training.memory import context_bytes, reset_peaks
from finetune_trainer.training.packing_check import PackingCheck
from finetune_trainer.training.reset_state import release, reset_stage_state
from finetune_trainer.training.samples import SamplesCallback
from finetune_trainer.training.stage_io import StageIO
from finetune_trainer.training.stage_result import adapter_note, save_result
from finetune_trainer.training.stage_work import StageWork
from finetune_trainer.training.step_times import StepTimes
from finetune_trainer.training.transport import TransportCallback

SAMPLE_PROMPTS = 4


def run_stages(order: WorkOrder) -> None:
    """Run all stages of a work order on this worker; see `launch.worker.train_loop`."""
    torch.set_num_threads(order.threads)
    run = RunConfig.model_validate_json(order.run)
    if run.work_dir is not None:
        os.chdir(run.work_dir)  # Ray starts workers in a directory of its own; relative paths refer to the job's
    storage, channel, placement = Storage(run.root), WorkerChannel(order.channel), _placement(order.accelerator)
    on_waiting(lambda text: channel.send(Waiting(text)))
    answer_inquiries()
    node = ray.get_runtime_context().get_node_id()
    initial = first_heartbeat(placement.rank, placement.world_size, node_name(), node)
    with HeartbeatThread(initial, process_heartbeat(), channel.heartbeat):
        set_group_timeout(run.job.spec.run_policy.ddp_timeout)
        collectives = Collectives(node_name(), run.job.spec.run_policy.loading_timeout_seconds)
        files = NodeFiles(run, storage, placement, collectives, count_nodes(collectives), channel.send)
        enter_phase("fetching the prepared data and the weights")
        files.receive(order.offer)
        collectives.rendezvous("its node has the prepared data and the weights")
        for work in order.stages:
            _run_stage(order, work, run, storage, channel, placement, files)


def _run_stage(
    order: WorkOrder,
    work: StageWork,
    run: RunConfig,
    storage: Storage,
    channel: WorkerChannel,
    placement: Placement,
    files: NodeFiles,
) -> None:
    """Run a stage unless it is done: Ray may have changed the world size and restarted the workers since."""
    if not storage.exists(layouts(run)[work.index].done):
        join_process_group(work.zero, placement.accelerator)
        send = channel.send if placement.rank == 0 else _discard
        send(StageBegun(work.index, placement.world_size))
        reset_peaks(placement.accelerator)
        enter_phase("preparing the stage's data", step=0, order=0)
        context = stage_context(run, work, order.threads, placement, storage, files)
        files.collectives.rendezvous("its data is loaded")
        StageRun(context, storage, channel, files.collectives, work, several_nodes=files.nodes > 1).train()
        send(StageDone(work.index))
        reset_stage_state()
    require_gate(run, storage, work.index)


def _discard(event: Event) -> None:
    """Only rank 0 sends events about a stage."""


@dataclass(frozen=True)
class _Callbacks:
    progress: ProgressCallback
    checkpoint: CheckpointCallback
    stop: StopCallback
    samples: SamplesCallback


class StageRun:
    """Runs one stage on one worker: connects its trainer to storage, to the other workers and to the driver."""

    def __init__(
        self,
        context: StageContext,
        storage: Storage,
        channel: WorkerChannel,
        collectives: Collectives,
        work: StageWork,
        several_nodes: bool = False,
    ) -> None:
        self.context, self.storage, self.channel = context, storage, channel
        self.collectives, self.work, self.several_nodes = collectives, work, several_nodes
        self.first = context.placement.rank == 0
        self.scratch = scratch(context.run, context.layout.index)
        self.store = CheckpointStore(storage, context.layout, self.scratch)
        self.output = StageOutput(context, storage, self.store, self.scratch)
        self.frozen: str | None = None
        self.transport: dict[str, str] = {}

    def train(self) -> None:
        """Run the stage until it is done or the driver asks it to stop.

        Raises:
            Interrupted: the driver has asked to stop; a checkpoint was saved.
        """
        if not self.context.spec.trains:
            with errors_with_step(self.context.layout.index):
                self._perform()
            return
        started = time.monotonic()
        self._log_loading_notes()
        resume = StageResume(self.context, self.store, self.collectives, self.scratch, self._log)
        resumed = resume.resume_point()
        self.context = replace(self.context, resumed=resumed)
        trainer = self._load(resumed)
        callbacks = self._attach(trainer, resumed)
        self._log(f"model ready after {time.monotonic() - started:.1f} s")
        self.frozen = frozen_note(trainer.model)
        if self.frozen:
            self._log(self.frozen)
        with errors_with_step(self.context.layout.index, trainer):
            enter_phase("preparing to train")
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.directory))
            resume.drop_copies(resumed)
            if callbacks.stop.stopped:
                raise Interrupted(f"stopped at step {trainer.state.global_step}, checkpoint saved")
            self._finish(trainer, callbacks)
        release(trainer)

    def _perform(self) -> None:
        """Run a stage that takes no optimizer steps."""
        stage_io = self._stage_io()
        self._log_loading_notes()
        metrics = perform(self.context, stage_io)
        if self.first:
            if self.context.prepared is not None:
                self.output.write_data_report()
            self.output.write_done(0, time.monotonic() - stage_io.started, 0, metrics)
        self.collectives.barrier()

    def _stage_io(self) -> StageIO:
        return StageIO(self.context, self.storage, self.collectives, self.channel, self.scratch)

    def _log_loading_notes(self) -> None:
        """Log how loading changes the saved model from which the stage starts."""
        context = self.context
        if self.first:
            for note in loading_notes(context.source, context.job_model, context.spec.task):
                self._log(note)

    def _load(self, resumed: ResumePoint | None) -> Any:
        enter_phase("loading the model")
        trainer = make_trainer(self.context)
        self.collectives.rendezvous("its model is loaded")
        trainer.args.eval_on_start = resumed is None and self.context.data.eval is not None
        return trainer

    def _attach(self, trainer: Any, resumed: ResumePoint | None) -> _Callbacks:
        """Add this worker's callbacks and the loss guard to a trainer, and restore the progress of a checkpoint."""
        progress = ProgressCallback(self.context, self.collectives, self.channel, self.work)
        progress.trainer, trainer.stage.paused = trainer, progress.paused
        trainer.stage.times = StepTimes(self.context.placement.accelerator)
        trainer.stage.times.leave_out(trainer.accelerator)
        LossGuard(self.context, self.collectives, DroppedSteps(self.store), self._log).attach(trainer)
        trainer.stage.routing = watch_routing(trainer.model)
        trainer.stage.io = self._stage_io()
        if self.first:
            self.output.fetch_metrics()
            progress.log_file = MetricsLog(self.output.metrics)
        if resumed is not None:
            progress.restore(json.loads((resumed.directory / PROGRESS_STATE).read_text()))
            if resumed.universal and self.context.zero == 3:
                trainer.add_callback(RepairOptimizerCallback(trainer))
        callbacks = self._callbacks(trainer, progress)
        if self.context.placement.accelerator and self.several_nodes:
            trainer.add_callback(TransportCallback(self.collectives, self.context.run.job, self._report_transport))
        for callback in (callbacks.samples, callbacks.stop, callbacks.checkpoint, callbacks.progress):
            trainer.add_callback(callback)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PackingCheck):
                callback.say = self._log
        return callbacks

    def _callbacks(self, trainer: Any, progress: ProgressCallback) -> _Callbacks:
        return _Callbacks(
            progress,
            CheckpointCallback(self.context, self.store, self.collectives, progress, trainer.stage.feed),
            StopCallback(self.collectives, self.channel, self.context.placement.rank),
            SamplesCallback(self.context, self.storage, _prompts(self.context), self.collectives),
        )

    def _finish(self, trainer: Any, callbacks: _Callbacks) -> None:
        """Save the last checkpoint, evaluate, save the result, and mark the stage as done last."""
        enter_phase("saving the result")
        trainer.stage.guard.check_weights()
        step = trainer.state.global_step
        if trainer.stage.keeps_last and self.collectives.any(self.first and self.store.manifest(step) is None):
            trainer._save_checkpoint(trainer.model, None)
            callbacks.checkpoint.publish(step)
        metrics = {} if self.context.data.eval is None else evaluation_metrics(trainer.evaluate())
        metrics |= trainer.final_metrics()
        callbacks.samples.after(trainer.model)
        save_result(trainer, self.context, self.output.result)
        if self.first:
            if (note := adapter_note(self.context, self.output.result)) is not None:
                self._log(note)
            self.output.publish()
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            metrics = ({"loss": losses[-1]} if losses else {}) | metrics
            seconds, tokens = callbacks.progress.rates.seconds, callbacks.progress.tokens
            self.output.write_done(step, seconds, tokens, metrics, frozen=self.frozen, transport=self.transport)
        self.collectives.barrier()

    def _report_transport(self, found: Transport, warning: str) -> None:
        if self.first:
            self.transport = {"words": found.words, "warning": warning}
            self.channel.send(TransportFound(found.network, found.gpu_direct, found.words, warning))

    def _log(self, line: str) -> None:
        if self.first:
            self.channel.send(f"{self.context.layout.title}: {line}")


def _placement(accelerator: bool) -> Placement:
    context = ray.train.get_context()
    ranks = context.get_world_rank(), context.get_local_rank(), context.get_world_size()
    return Placement(*ranks, accelerator, context_bytes(accelerator))


def _prompts(context: StageContext) -> list[dict[str, Any]]:
    """Return prompts for samples during training; none for masked models and reward models."""
    spec = context.spec
    if spec.task != "causal":
        return []
    return eval_prompts(spec, Path(context.run.base_dir), Path(context.run.cache_dir), SAMPLE_PROMPTS)
