"""Runs the stages of a job one after the other, each from the result of the previous one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_trainer.errors import GateNotPassed, Interrupted, OutOfMemory, TrainingFailed, UserError
from finetune_trainer.gate import require_gate
from finetune_trainer.heartbeat import enter_phase, record_progress
from finetune_trainer.launch.cluster import keep_signal_handlers, start_ray, stop_ray
from finetune_trainer.launch.driver_watch import DriverWatch, end_process
from finetune_trainer.launch.failures import Failure, Kind
from finetune_trainer.launch.nodes import Nodes, may_have_several_nodes
from finetune_trainer.launch.preparation import Preparation
from finetune_trainer.launch.resume import finished, open_run
from finetune_trainer.launch.sharing.offer import Offers, fetch_weights
from finetune_trainer.launch.stall_diagnosis import Stalled, end_workers, inquire, keep
from finetune_trainer.launch.stall_watch import Stall
from finetune_trainer.launch.tokenizer_run import run_tokenizer_stage
from finetune_trainer.launch.worker_group import HasGrown, WorkerGroup, retry_attempts
from finetune_trainer.layout import REPORT, StageLayout
from finetune_trainer.plan.records import StagePlan
from finetune_trainer.plan.workers import Workers, plan_workers
from finetune_trainer.preflight.job import preflight
from finetune_trainer.preflight.saving import room_problems
from finetune_trainer.progress.channel import (
    CheckpointSaved,
    Event,
    Placing,
    StageBegun,
    StageDone,
    TransportFound,
    Waiting,
)
from finetune_trainer.progress.reporter import Progress, Reporter
from finetune_trainer.runtime import nccl_log_variables
from finetune_trainer.stage_graph import layouts
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.storage.retry import on_waiting
from finetune_trainer.training.stage_work import StageWork


class Pipeline:
    """The driver of one attempt at a job.

    Args:
        stop: set it, from a signal handler or another thread, to save a checkpoint and stop.
        hung: receives the diagnosis of a driver that makes no progress, from another thread; must end the process.
    """

    def __init__(
        self,
        run: RunConfig,
        reporter: Reporter,
        stop: threading.Event,
        hung: Callable[[str], None] = end_process,
    ) -> None:
        self.run, self.reporter, self.stop = run, reporter, stop
        self.watch = DriverWatch(run.job.spec.run_policy.stall_timeout, hung)
        on_waiting(reporter.waiting)
        self.storage = Storage(run.root)
        self.layouts = layouts(run)
        self.workers: Workers = plan_workers(run.job.spec.resources)
        self.plans: dict[int, StagePlan] = {}
        self.peak: float | None = None

    def execute(self, *, resume: bool = False, fresh: bool = False, checked: bool = False) -> None:
        """Run every stage that is not done, then write the report.

        Args:
            resume: continue an earlier run in the job's directory.
            fresh: set an earlier run aside.
            checked: whether a preflight has passed elsewhere, so that none is run here.

        Raises:
            UserError: the preflight or a stage found the settings or the data unusable.
            GateNotPassed: an evaluation missed its gate; no later stage has begun.
            Interrupted: stopped on request, with a checkpoint saved.
            OutOfMemory, TrainingFailed: a stage failed; its checkpoints are kept.
        """
        with self.watch:
            self._execute(resume, fresh, checked)

    def _execute(self, resume: bool, fresh: bool, checked: bool) -> None:
        enter_phase("checking the job")
        if not checked:
            preflight(self.run, self.workers)
        self.run = open_run(self.run, self.storage, resume=resume, fresh=fresh)
        for layout in self._stages(done=True):
            self.reporter.log(f"{layout.title}: done before, not run again")
            self._require_gate(layout)
        if self._stages():
            self._run_stages()
        else:
            self._report()
        self.reporter.log(f"report: {self.storage.path(REPORT)}")

    def _require_gate(self, layout: StageLayout) -> None:
        """Check the metrics of an earlier attempt against the current gate of the job."""
        try:
            require_gate(self.run, self.storage, layout.index)
        except GateNotPassed:
            self._report()
            raise

    def finished_stages(self) -> list[bool]:
        """Return for each stage whether an earlier attempt has finished it."""
        return finished(self.run, self.storage)

    def _run_stages(self) -> None:
        # Ray starts while data is prepared. Its processes die with the thread that has started them (PR_SET_PDEATHSIG),
        # so that thread must live as long as the pipeline, as the thread of an executor does.
        with ThreadPoolExecutor(max_workers=1) as background:
            ray_started = background.submit(start_ray, self.workers, variables=self._worker_variables())
            try:
                self._tokenizer()
                self._prepare()
                self._train(ray_started)
            except BaseException:
                self._report_failure()
                raise
            else:
                self._report()
            finally:
                stop_ray(ray_started)

    def _worker_variables(self) -> dict[str, str]:
        """Return variables that enable the NCCL log of GPU workers on several nodes: only it shows the transport."""
        several = self.workers.accelerator and may_have_several_nodes(self.run.job.spec.resources)
        return nccl_log_variables(os.environ) if several else {}

    def _stages(self, done: bool = False) -> list[StageLayout]:
        """Return the stages that are not done yet, or those that are."""
        states = finished(self.run, self.storage)
        return [layout for layout in self.layouts if states[layout.index] is done]

    def _tokenizer(self) -> None:
        first = self.layouts[0]
        if self.run.job.spec.stages[0].tokenizer is None or first not in self._stages():
            return
        enter_phase("training a tokenizer")
        self.reporter.stage_started(0, first.title, len(self.layouts), "training a tokenizer")
        metrics = run_tokenizer_stage(self.run, self.storage, first, self.reporter)
        self.reporter.stage_finished(0, first.title, self.storage.path(first.result), metrics)

    def _prepare(self) -> None:
        enter_phase("preparing the data of all stages")
        preparation = Preparation(self.run, self.workers, self.storage, self._log_progress)
        plan = preparation.run_all(self._stages(), self.stop)
        if problems := list(room_problems(self.run, plan, on_node=True)):
            raise UserError(problems)
        self.plans, self.peak = {stage.index: stage for stage in plan.stages}, plan.peak
        if may_have_several_nodes(self.run.job.spec.resources):
            fetch_weights(self.run, self._stages(), self.reporter.log)

    def _log_progress(self, line: str) -> None:
        record_progress()
        self.reporter.log(line)

    def _train(self, ray_started: Future[None]) -> None:
        if not self._stages():
            return
        with self.watch.paused():
            ray_started.result()
        keep_signal_handlers()
        self._check_stop()
        with self.watch.paused():
            failure = self._train_stages()
        if failure is not None:
            self._raise(failure)

    def _train_stages(self) -> Failure | None:
        """Run worker groups until all stages are done (None) or a failure is final."""
        offers = Offers(self.run, self.storage, self.reporter.log)
        try:
            return self._train_with_retries(offers)
        finally:
            offers.close(done=not self._stages())

    def _train_with_retries(self, offers: Offers) -> Failure | None:
        offer = offers.make() if may_have_several_nodes(self.run.job.spec.resources) else None
        group = WorkerGroup(self.run, self.workers, self._on_event, self.stop, self._on_stall, offer)
        return retry_attempts(
            lambda: group.attempt([self._work(layout) for layout in self._stages()]),
            HasGrown(self._completed),
            self.stop.wait,
            self.run.job.spec.run_policy.backoff_limit,
            self.reporter.restarting,
            Nodes(self.run.job.spec.resources, self.stop).missing,
        )

    def _work(self, layout: StageLayout) -> StageWork:
        """Return the planned work of a stage. A resumed one keeps the sharding and global batch of its checkpoint."""
        plan = self.plans.get(layout.index)
        if plan is None:  # it takes no optimizer steps, so it has no checkpoints
            return StageWork(layout.index, zero=0, flops_per_token=0.0, peak_flops=self.peak)
        newest = self._store(layout).newest()
        if newest is None:
            zero, rows, shards = plan.zero, plan.steps.rows_per_step, self.workers.most
        else:
            zero, rows, shards = newest.zero, newest.rows_per_step, newest.shards
        return StageWork(layout.index, zero, plan.flops_per_token, self.peak, rows, plan.trainable, shards)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.reporter.progress(event)
        elif isinstance(event, StageBegun):
            self._stage_begun(event)
        elif isinstance(event, Waiting):
            self.reporter.waiting(event.text)
        elif isinstance(event, TransportFound):
            self.reporter.transport(event.network, event.gpu_direct, event.words, event.warning)
        elif isinstance(event, Placing):
            self.reporter.placing(event.text)
        elif isinstance(event, CheckpointSaved):
            path = self.storage.path(self.layouts[event.index].checkpoint(event.step))
            self.reporter.checkpoint_saved(event.index, event.step, path)
        elif isinstance(event, StageDone):
            self._stage_done(event)
        else:
            self.reporter.log(event)

    def _stage_begun(self, event: StageBegun) -> None:
        plan = self.plans.get(event.index)
        plural = "s" if event.workers > 1 else ""
        message = f"{event.workers} worker{plural}" + (f", {plan.why}" if plan else "")
        self.reporter.stage_started(event.index, self.layouts[event.index].title, len(self.layouts), message)

    def _stage_done(self, event: StageDone) -> None:
        layout = self.layouts[event.index]
        metrics = json.loads(self.storage.read_text(layout.done))["metrics"]
        self.reporter.stage_finished(event.index, layout.title, self.storage.path(self._output(layout)), metrics)

    def _on_stall(self, stall: Stall) -> Failure:
        """Report a stall, diagnose it, end the workers, and return the failure.

        On a cluster the pods of the next attempt avoid the node that was behind.
        """
        self.reporter.stalled(stall.words(stall.culprit), None)

        def report(text: str) -> None:
            self.reporter.log(text)
            keep(self.storage, self.run.attempt, text)

        finding = inquire(stall, report)
        self.reporter.stalled(finding.text, finding.host)
        end_workers(stall)
        elsewhere = bool(os.environ.get("RAY_ADDRESS"))
        return Failure(Kind.STALLED, Stalled(finding.text), finding.text, node=finding.host, elsewhere=elsewhere)

    def _output(self, layout: StageLayout) -> str:
        """Return the path of the stage's result or evaluation in storage."""
        return layout.evaluation if self.run.job.spec.stages[layout.index].evaluate else layout.result

    def _raise(self, failure: Failure) -> None:
        if failure.kind in (Kind.USER, Kind.GATE, Kind.INTERRUPTED):
            raise failure.error
        if self.stop.is_set():
            raise Interrupted("stopped; the last complete checkpoint is kept")
        kind = OutOfMemory if failure.kind is Kind.OUT_OF_MEMORY else TrainingFailed
        raise kind(failure.text, failure.advice, failure.node) from failure.error

    def _store(self, layout: StageLayout) -> CheckpointStore:
        return CheckpointStore(self.storage, layout, Path(self.run.cache_dir, "scratch"))

    def _completed(self) -> tuple[int, int]:
        """Return the number of finished stages and the newest checkpoint of the next one; grows with progress."""
        todo = self._stages()
        newest = self._store(todo[0]).newest() if todo else None
        return len(self.layouts) - len(todo), newest.step if newest else 0

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped before training began")

    def _report_failure(self) -> None:
        """Write the report after a failure. An error here must not hide the failure: a full disk may cause both."""
        try:
            self._report()
        except Exception as error:
            self.reporter.log(f"no report: {type(error).__name__}: {error}")

    def _report(self) -> None:
        enter_phase("writing the report")
        from finetune_trainer.report import write_report  # imports matplotlib, which is slow to load

        write_report(self.storage, self.layouts, self.run)
