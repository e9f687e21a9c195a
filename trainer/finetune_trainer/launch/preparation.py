"""Before anything trains: every stage's data tokenised, and its memory and steps planned."""

from __future__ import annotations

import threading
from pathlib import Path

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_trainer.data import DataReport, prepare
from finetune_trainer.data.summary import data_line
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.launch.cluster import Workers
from finetune_trainer.layout import StageLayout
from finetune_trainer.model.load import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.plan.devices import local_device
from finetune_trainer.plan.job import DataSize, JobPlan, PlanContext, plan_job
from finetune_trainer.progress.reporter import Reporter
from finetune_trainer.storage import Storage


class Preparation:
    """Tokenises all data up front, so that a fault in the last stage's is told before the first one trains."""

    def __init__(self, run: RunConfig, workers: Workers, storage: Storage, reporter: Reporter) -> None:
        self.run, self.workers, self.storage, self.reporter = run, workers, storage, reporter
        # All trained stages of a job have the tokenizer and the architecture that the first of them starts from.
        first = 1 if run.job.spec.stages[0].tokenizer is not None else 0
        self.source = stage_source(run, first, storage)
        self.tokenizer = load_tokenizer(self.source)
        self.config = load_config(self.source, self.tokenizer)

    def run_all(self, todo: list[StageLayout], stop: threading.Event) -> JobPlan:
        """Prepare the stages' data; returns the plan of all trained stages.

        Raises:
            UserError: every fault in every stage's data.
            Interrupted: `stop` was set between two stages.
        """
        reports: dict[int, DataReport] = {}
        problems: list[Problem] = []
        for layout in todo:
            if stop.is_set():
                raise Interrupted("stopped before training began")
            try:
                reports[layout.index] = self._prepare(layout)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return self._plan(reports)

    def _prepare(self, layout: StageLayout) -> DataReport:
        stage = self.run.job.spec.stages[layout.index]
        prepared = prepare(
            stage.spec,  # type: ignore[arg-type]  # the tokenizer stage is done by now
            self.tokenizer,
            context_length(self.config),
            where=f"stages[{layout.index}].{stage.kind}",
            cache_dir=Path(self.run.cache_dir),
            base_dir=Path(self.run.base_dir),
            num_proc=self.workers.cpus * self.workers.most,
            on_progress=lambda line: self.reporter.log(f"{layout.title}: {line}"),
        )
        self.reporter.log(f"{layout.title}: {data_line(prepared.report)}")
        return prepared.report

    def _plan(self, reports: dict[int, DataReport]) -> JobPlan:
        context = PlanContext(local_device(self.workers.most), self.workers.most, self.config)
        return plan_job(self.run, context, lambda index: data_size(reports.get(index)))


def data_size(report: DataReport | None) -> DataSize | None:
    """What a plan needs to know of prepared data; None where nothing is known."""
    if report is None or report.streaming:
        return None
    return DataSize(report.packed_rows or report.kept, report.tokens, report.longest)
