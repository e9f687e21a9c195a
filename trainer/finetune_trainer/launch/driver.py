"""The pipeline: one stage after the other, each from the result of the one before."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from finetune_api.runconfig import RunConfig
from finetune_api.stages import TokenizerSpec
from finetune_trainer.checkpoint.store import CheckpointStore
from finetune_trainer.data import prepare
from finetune_trainer.data.summary import data_line
from finetune_trainer.errors import Interrupted, OutOfMemory, TrainingFailed, UserError
from finetune_trainer.launch.cluster import Workers, plan_workers, start_ray
from finetune_trainer.launch.failures import Failure, Kind
from finetune_trainer.launch.resume import finished, open_run
from finetune_trainer.launch.stage_fit import StageFit, keep_trying
from finetune_trainer.launch.tokenizer_run import run_tokenizer_stage
from finetune_trainer.layout import REPORT, StageLayout
from finetune_trainer.model.load import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import layouts, stage_source
from finetune_trainer.launch.sizing import stage_zero
from finetune_trainer.preflight import preflight
from finetune_trainer.progress.reporter import Reporter
from finetune_trainer.report import write_report
from finetune_trainer.storage import Storage


class Pipeline:
    """One attempt at a job, in this process.

    Args:
        stop: set it, from a signal handler or another thread, to save a checkpoint and stop.
    """

    def __init__(self, run: RunConfig, reporter: Reporter, stop: threading.Event) -> None:
        self.run, self.reporter, self.stop = run, reporter, stop
        self.storage = Storage(run.root)
        self.layouts = layouts(run)
        self.workers: Workers = plan_workers(run.job.spec.resources)
        # Ray starts while data is prepared. Its processes die with the thread that started them (PR_SET_PDEATHSIG), so
        # that thread must live as long as the pipeline: an executor's does.
        self._background = ThreadPoolExecutor(max_workers=1)
        self._ray: Future[None] | None = None

    def execute(self, *, resume: bool = False, fresh: bool = False) -> None:
        """Run every stage that isn't done, then write the report.

        Raises:
            UserError: nothing was trained, or a stage found its data or settings unusable.
            Interrupted: stopped on request, a checkpoint saved.
            OutOfMemory, TrainingFailed: a stage failed; its checkpoints are kept.
        """
        preflight(self.run)
        open_run(self.run, self.storage, resume=resume, fresh=fresh)
        done = finished(self.run, self.storage)
        if not all(done):
            self._ray = self._background.submit(start_ray, self.workers)
            try:
                self._stages(done)
            finally:
                self._report()
        self._report(say=True)

    def _stages(self, done: list[bool]) -> None:
        if isinstance(self.run.job.spec.stages[0].spec, TokenizerSpec) and not done[0]:
            self._begin(self.layouts[0], "training a tokenizer")
            metrics = run_tokenizer_stage(self.run, self.storage, self.layouts[0], self.reporter)
            self._end(self.layouts[0], metrics)
            done = [True, *done[1:]]
        self._prepare([layout for layout in self.layouts if not done[layout.index]])
        for layout in self.layouts:
            if done[layout.index]:
                self.reporter.log(f"{layout.title}: done before, not run again")
            else:
                self._train(layout)

    def _prepare(self, todo: list[StageLayout]) -> None:
        """Tokenise every stage's data before the first one trains, so that a fault in any is told now."""
        problems = []
        for layout in todo:
            self._check_stop()
            stage = self.run.job.spec.stages[layout.index]
            source = stage_source(self.run, self._known_source(layout), self.storage)
            tokenizer = load_tokenizer(source)
            context = context_length(load_config(source, tokenizer))
            try:
                prepared = prepare(
                    stage.spec,  # type: ignore[arg-type]
                    tokenizer,
                    context,
                    where=f"stages[{layout.index}].{stage.kind}",
                    cache_dir=Path(self.run.cache_dir),
                    base_dir=Path(self.run.base_dir),
                    num_proc=self.workers.cpus * self.workers.most,
                    on_progress=self.reporter.log,
                )
                self.reporter.log(f"{layout.title}: {data_line(prepared.report)}")
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def _known_source(self, layout: StageLayout) -> int:
        """The first stage whose source has this stage's tokenizer and architecture: they never change in a job."""
        return 1 if self.run.job.spec.stages[0].tokenizer is not None else 0

    def _train(self, layout: StageLayout) -> None:
        self._check_stop()
        assert self._ray is not None
        self._ray.result()
        store = CheckpointStore(self.storage, layout, Path(self.run.cache_dir, "scratch"))
        newest = store.newest()
        zero, why = stage_zero(self.run, layout.index, self.workers, newest)
        self._begin(layout, f"{self.workers.most} workers, ZeRO-{zero}: {why}")
        fit = StageFit(self.run, layout.index, zero, self.workers, self.reporter, self.stop)
        failure = keep_trying(
            fit.run_once,
            _Progressed(store),
            self.stop.wait,
            self.run.job.spec.run_policy.backoff_limit,
            self.reporter.log,
        )
        if failure is not None:
            self._raise(failure)
        self._end(layout, json.loads(self.storage.read_text(layout.done))["metrics"])

    def _raise(self, failure: Failure) -> None:
        if failure.kind in (Kind.USER, Kind.INTERRUPTED):
            raise failure.error
        if self.stop.is_set():
            raise Interrupted("stopped; the last complete checkpoint is kept")
        kind = OutOfMemory if failure.kind is Kind.OUT_OF_MEMORY else TrainingFailed
        raise kind(failure.text) from failure.error

    def _begin(self, layout: StageLayout, message: str) -> None:
        self.reporter.stage_started(layout.index, layout.title, len(self.layouts), message)

    def _end(self, layout: StageLayout, metrics: dict[str, float]) -> None:
        self.reporter.stage_finished(layout.index, layout.title, self.storage.path(layout.result), metrics)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped before the next stage began")

    def _report(self, say: bool = False) -> None:
        write_report(self.storage, self.layouts, self.run)
        if say:
            self.reporter.log(f"report: {self.storage.path(REPORT)}")


class _Progressed:
    """Whether a newer checkpoint was completed since the last call."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self.step = self._newest()

    def __call__(self) -> bool:
        before, self.step = self.step, self._newest()
        return self.step > before

    def _newest(self) -> int:
        newest = self.store.newest()
        return newest.step if newest else 0
