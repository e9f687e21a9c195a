"""The pipeline: one stage after the other, each from the result of the one before."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_trainer.checkpoint.store import CheckpointStore
from finetune_trainer.errors import GateNotPassed, Interrupted, OutOfMemory, TrainingFailed, UserError
from finetune_trainer.gate import require_gate
from finetune_trainer.launch.cluster import Workers, keep_signal_handlers, plan_workers, start_ray, stop_ray
from finetune_trainer.launch.driver_watch import DriverWatch, end_process
from finetune_trainer.launch.failures import Failure, Kind
from finetune_trainer.launch.group_fit import GroupFit, keep_trying
from finetune_trainer.launch.nodes import Nodes, may_have_several_nodes
from finetune_trainer.launch.preparation import Preparation
from finetune_trainer.launch.resume import finished, open_run
from finetune_trainer.launch.sharing.offer import Offers, fetch_weights
from finetune_trainer.launch.stall_inquiry import Stalled, end_workers, inquire, keep
from finetune_trainer.launch.stall_watch import Stall
from finetune_trainer.launch.tokenizer_run import run_tokenizer_stage
from finetune_trainer.layout import REPORT, StageLayout
from finetune_trainer.patience import listen
from finetune_trainer.pipeline import layouts
from finetune_trainer.plan.records import StagePlan
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
from finetune_trainer.pulse import beat, enter
from finetune_trainer.runtime import nccl_log_variables
from finetune_trainer.storage import Storage
from finetune_trainer.training.work import StageWork


class Pipeline:
    """One attempt at a job, in this process.

    Args:
        stop: set it, from a signal handler or another thread, to save a checkpoint and stop.
        hung: receives, from another thread, what is known of a driver that makes no progress; ends the process.
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
        listen(reporter.waiting)
        self.storage = Storage(run.root)
        self.layouts = layouts(run)
        self.workers: Workers = plan_workers(run.job.spec.resources)
        self.plans: dict[int, StagePlan] = {}
        self.peak: float | None = None

    def execute(self, *, resume: bool = False, fresh: bool = False, checked: bool = False) -> None:
        """Run every stage that isn't done, then write the report.

        Args:
            checked: a preflight has passed elsewhere.

        Raises:
            UserError: nothing was trained, or a stage found its data or settings unusable.
            GateNotPassed: an evaluation missed a bound; no stage after it has begun.
            Interrupted: stopped on request, a checkpoint saved.
            OutOfMemory, TrainingFailed: a stage failed; its checkpoints are kept.
        """
        with self.watch:
            self._execute(resume, fresh, checked)

    def _execute(self, resume: bool, fresh: bool, checked: bool) -> None:
        enter("checking the job")
        if not checked:
            preflight(self.run, self.workers)
        self.run = open_run(self.run, self.storage, resume=resume, fresh=fresh)
        for layout in self._todo(done=True):
            self.reporter.log(f"{layout.title}: done before, not run again")
            self._require_gate(layout)
        if self._todo():
            self._run_stages()
        else:
            self._report()
        self.reporter.log(f"report: {self.storage.path(REPORT)}")

    def _require_gate(self, layout: StageLayout) -> None:
        """What an earlier attempt has measured, held against the bounds that the job sets now."""
        try:
            require_gate(self.run, self.storage, layout.index)
        except GateNotPassed:
            self._report()
            raise

    def finished_stages(self) -> list[bool]:
        """For each stage, whether an earlier attempt has finished it."""
        return finished(self.run, self.storage)

    def _run_stages(self) -> None:
        # Ray starts while data is prepared. Its processes die with the thread that started them (PR_SET_PDEATHSIG), so
        # that thread must live as long as the pipeline: an executor's does.
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
        """Return what workers of several nodes with GPUs need: NCCL tells in its log alone that it uses TCP."""
        several = self.workers.accelerator and may_have_several_nodes(self.run.job.spec.resources)
        return nccl_log_variables(os.environ) if several else {}

    def _todo(self, done: bool = False) -> list[StageLayout]:
        states = finished(self.run, self.storage)
        return [layout for layout in self.layouts if states[layout.index] is done]

    def _tokenizer(self) -> None:
        first = self.layouts[0]
        if self.run.job.spec.stages[0].tokenizer is None or first not in self._todo():
            return
        enter("training a tokenizer")
        self.reporter.stage_started(0, first.title, len(self.layouts), "training a tokenizer")
        metrics = run_tokenizer_stage(self.run, self.storage, first, self.reporter)
        self.reporter.stage_finished(0, first.title, self.storage.path(first.result), metrics)

    def _prepare(self) -> None:
        enter("preparing the data of all stages")
        preparation = Preparation(self.run, self.workers, self.storage, self._say)
        plan = preparation.run_all(self._todo(), self.stop)
        if problems := list(room_problems(self.run, plan, on_node=True)):
            raise UserError(problems)
        self.plans, self.peak = {stage.index: stage for stage in plan.stages}, plan.peak
        if may_have_several_nodes(self.run.job.spec.resources):
            fetch_weights(self.run, self._todo(), self.reporter.log)

    def _say(self, line: str) -> None:
        beat()
        self.reporter.log(line)

    def _train(self, ray_started: Future[None]) -> None:
        if not self._todo():
            return
        enter("starting Ray")
        ray_started.result()
        keep_signal_handlers()
        self._check_stop()
        enter("looking for checkpoints")
        failure = self._train_stages()
        if failure is not None:
            self._raise(failure)

    def _train_stages(self) -> Failure | None:
        """Let the workers train until nothing is left to do, or a failure is final."""
        offers, done = Offers(self.run, self.storage, self.reporter.log), False
        try:
            failure = self._keep_trying(offers)
            done = failure is None  # storage is not asked: it may hang, and be the cause of the failure
            return failure
        finally:
            offers.close(done=done)

    def _keep_trying(self, offers: Offers) -> Failure | None:
        with self.watch.paused():  # an upload may take long
            offer = offers.make() if may_have_several_nodes(self.run.job.spec.resources) else None
        fit = GroupFit(self.run, self.workers, self._hear, self.stop, self._stalled, offer, self.watch.listening)
        return keep_trying(
            lambda: self._attempt(fit),
            _Progressed(self._progress_mark),
            self.watch.unwatched(self.stop.wait),
            self.run.job.spec.run_policy.backoff_limit,
            self.reporter.restarting,
            self.watch.unwatched(Nodes(self.run.job.spec.resources, self.stop).missing),
        )

    def _attempt(self, fit: GroupFit) -> Failure | None:
        work = [self._work(layout) for layout in self._todo()]
        with self.watch.paused():
            return fit.attempt(work)

    def _work(self, layout: StageLayout) -> StageWork:
        """As planned; a stage that has a checkpoint goes on with the sharding and the global batch that wrote it."""
        plan = self.plans.get(layout.index)
        if plan is None:  # it takes no optimizer steps, and has no checkpoints to look for
            return StageWork(layout.index, zero=0, flops_per_token=0.0, peak_flops=self.peak)
        newest = self._store(layout).newest()
        if newest is None:
            zero, rows, shards = plan.zero, plan.steps.rows_per_step, self.workers.most
        else:
            zero, rows, shards = newest.zero, newest.rows_per_step, newest.shards
        return StageWork(layout.index, zero, plan.flops_per_token, self.peak, rows, plan.trainable, shards)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.reporter.progress(event)
        elif isinstance(event, StageBegun):
            layout = self.layouts[event.index]
            plural = "s" if event.workers > 1 else ""
            plan = self.plans.get(event.index)
            message = f"{event.workers} worker{plural}" + (f", {plan.why}" if plan else "")
            self.reporter.stage_started(event.index, layout.title, len(self.layouts), message)
        elif isinstance(event, Waiting):
            self.reporter.waiting(event.text)
        elif isinstance(event, TransportFound):
            self.reporter.transport(event.network, event.gpu_direct, event.words, event.warning)
        elif isinstance(event, Placing):
            self.reporter.placing(event.text)
        elif isinstance(event, CheckpointSaved):
            place = self.storage.path(self.layouts[event.index].checkpoint(event.step))
            self.reporter.checkpoint_saved(event.index, event.step, place)
        elif isinstance(event, StageDone):
            layout = self.layouts[event.index]
            metrics = json.loads(self.storage.read_text(layout.done))["metrics"]
            self.reporter.stage_finished(event.index, layout.title, self.storage.path(self._outcome(layout)), metrics)
        else:
            self.reporter.log(event)

    def _stalled(self, stall: Stall) -> Failure:
        """Tell, look into it, end the workers. On a cluster the next attempt's pods keep away from the node."""
        self.reporter.stalled(stall.words(stall.culprit), None)

        def told(text: str) -> None:
            self.reporter.log(text)
            keep(self.storage, self.run.attempt, text)

        finding = inquire(stall, told)
        self.reporter.stalled(finding.text, finding.host)
        end_workers(stall)
        # Workers that have not begun are unknown here: they end with their pods, or with this process.
        elsewhere = bool(os.environ.get("RAY_ADDRESS")) or not stall.begun
        return Failure(Kind.STALLED, Stalled(finding.text), finding.text, node=finding.host, elsewhere=elsewhere)

    def _outcome(self, layout: StageLayout) -> str:
        """What a stage leaves for whoever looks."""
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

    def _progress_mark(self) -> tuple[int, int]:
        """Grows with each finished stage and each completed checkpoint."""
        todo = self._todo()
        newest = self._store(todo[0]).newest() if todo else None
        return len(self.layouts) - len(todo), newest.step if newest else 0

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped before training began")

    def _report_failure(self) -> None:
        """What broke a stage may break its report, too (a full disk), and is what must be told."""
        try:
            self._report()
        except Exception as error:
            self.reporter.log(f"no report: {type(error).__name__}: {error}")

    def _report(self) -> None:
        enter("writing the report")
        from finetune_trainer.report import write_report  # matplotlib loads slowly, and nothing waits for it here

        write_report(self.storage, self.layouts, self.run)


class _Progressed:
    """Whether a mark has grown since the last call."""

    def __init__(self, mark: Callable[[], tuple[int, int]]) -> None:
        self.mark = mark
        self.last = mark()

    def __call__(self) -> bool:
        before, self.last = self.last, self.mark()
        return self.last > before
