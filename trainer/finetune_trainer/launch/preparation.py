"""Prepare a job before training: tokenize the data of every stage, and plan memory and steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from finetune_api.problems import Problem
from finetune_api.runconfig import RunConfig
from finetune_api.stages import EvaluateSpec
from finetune_api.training import TrainingSpec
from finetune_trainer.data import DataReport, Prepared, prepare
from finetune_trainer.data.row_kinds import row_kind
from finetune_trainer.data.summary import data_line
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.evaluation.rows import eval_rows
from finetune_trainer.form import FORMS, main_form
from finetune_trainer.launch.same_data import compare_data
from finetune_trainer.layout import StageLayout
from finetune_trainer.model.config import context_length, load_config, load_tokenizer
from finetune_trainer.model.source import stage_source
from finetune_trainer.plan.devices import local_device
from finetune_trainer.plan.job import plan_job
from finetune_trainer.plan.records import DataSize, JobPlan, PlanContext
from finetune_trainer.plan.workers import Workers
from finetune_trainer.stage_graph import directories, layouts, place, spec_of, waits_for
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.filesystem import Storage


class Preparation:
    """Tokenises all data in advance, so that faults in any stage's data are reported before the first stage trains.

    Args:
        log: receives a line of text for each event.

    Raises:
        UserError: there is no tokenizer or no model.
    """

    def __init__(self, run: RunConfig, workers: Workers, storage: Storage, log: Callable[[str], None]) -> None:
        self.run, self.workers, self.storage, self.log = run, workers, storage, log
        # All trained stages of a job use the tokenizer and the architecture that the first of them starts from.
        first = 1 if run.job.spec.stages[0].tokenizer is not None else 0
        source = stage_source(run, first, storage)
        self.tokenizer = load_tokenizer(source)
        self.config = load_config(source, self.tokenizer)

    def run_all(self, todo: list[StageLayout], stop: threading.Event) -> JobPlan:
        """Prepare the stages' data and return the plan of all trained stages.

        Raises:
            UserError: lists every fault in the data of all stages.
            Interrupted: `stop` was set between two stages.
        """
        sizes: dict[int, DataSize | None] = {}
        problems: list[Problem] = []
        for layout in filter(self._can_be_prepared, todo):
            if stop.is_set():
                raise Interrupted("stopped before training began")
            try:
                sizes[layout.index] = self.prepare(layout.index)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        return self._plan(sizes)

    def _can_be_prepared(self, layout: StageLayout) -> bool:
        """Whether the stage reads data that exists. Data of an unfinished stage is prepared by the workers."""
        stage = self.run.job.spec.stages[layout.index]
        waits = any(not self.storage.exists(other.done) for other in waits_for(self.run, layout.index))
        reads = stage.evaluate is not None or isinstance(stage.spec, TrainingSpec)
        return reads and not waits

    def prepare(self, index: int) -> DataSize | None:
        """Prepare one stage's data and return its size, or None if it is not known.

        Raises:
            UserError: lists every fault in the data.
        """
        spec, stage = spec_of(self.run, index), self.run.job.spec.stages[index]
        if isinstance(spec, EvaluateSpec):
            return self._rows(spec, index)
        assert isinstance(spec, TrainingSpec)
        prepared = prepare(
            spec,
            self.tokenizer,
            context_length(self.config),
            where=place(self.run, index),
            cache_dir=Path(self.run.cache_dir),
            base_dir=Path(self.run.base_dir),
            num_proc=self.workers.cpus * self.workers.most,
            on_progress=lambda line: self.log(f"{stage.title}: {line}"),
        )
        self.log(f"{stage.title}: {data_line(prepared.report)}")
        if (note := self._form_note(spec, prepared.report)) is not None:
            self.log(f"{stage.title}: {note}")
        self._compare(index, prepared)
        return data_size(prepared.report)

    def _compare(self, index: int, prepared: Prepared) -> None:
        """Compare the data with what the stage's newest checkpoint was trained on, if it has one.

        Raises:
            UserError: the training rows differ.
        """
        layout = layouts(self.run)[index]
        newest = CheckpointStore(self.storage, layout, Path(self.run.cache_dir, "scratch")).newest()
        for note in compare_data(self.run, index, newest, prepared.key).notes if newest else ():
            self.log(f"{layout.title}: {note}")

    def _form_note(self, spec: TrainingSpec, report: DataReport) -> str | None:
        """Return a note if the stage does not use the tokenizer's chat template, else None."""
        form = main_form(report.forms)
        if row_kind(spec.row_kind).joined or form in (None, "chat") or not self.tokenizer.chat_template:
            return None
        return f"the rows are {FORMS[form]}: the chat template is not used, and `finetune chat` asks without it, too"

    def _rows(self, spec: EvaluateSpec, index: int) -> DataSize | None:
        """Return the size of an evaluation's rows, read as its workers read them."""
        if spec.data is None:
            return None
        where, places = place(self.run, index), directories(self.run)
        rows = eval_rows(spec, self.tokenizer, context_length(self.config), where, **places)
        self.log(f"{self.run.job.spec.stages[index].title}: {len(rows)} rows to measure")
        return DataSize(len(rows), sum(row.length for row in rows), max(row.length for row in rows))

    def _plan(self, sizes: dict[int, DataSize | None]) -> JobPlan:
        context = PlanContext(local_device(self.workers.most), self.workers.most, self.config)
        return plan_job(self.run, context, sizes.get)


def data_size(report: DataReport | None) -> DataSize | None:
    """Return the size of prepared data for a plan; None if it is not known."""
    if report is None or report.streaming:
        return None
    return DataSize(report.packed_rows or report.kept, report.tokens, report.longest)
