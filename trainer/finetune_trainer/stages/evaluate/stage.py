"""Evaluate the model of the previous stages, and the models to compare it with, on rows and on benchmark tasks."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

from finetune_api.stages.evaluation import PERPLEXITY
from finetune_trainer.evaluation.compared_models import Contender, contenders, form_note, open_model
from finetune_trainer.evaluation.harness_tasks import run_tasks
from finetune_trainer.evaluation.likelihood import likelihoods
from finetune_trainer.evaluation.query_execution import open_database
from finetune_trainer.evaluation.results_log import ResultsLog
from finetune_trainer.evaluation.rows import EvalRow, batches, eval_rows
from finetune_trainer.evaluation.scores import Row, Scorer, totals
from finetune_trainer.gate import Measured
from finetune_trainer.generation.batches import generate_batch
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.model.config import context_length
from finetune_trainer.stage_graph import directories
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.reset_state import reset_stage_state
from finetune_trainer.training.stage_io import StageIO

SAMPLES = 8
"""Number of rows whose answers the report shows for all models."""


def perform(context: StageContext, tools: StageIO) -> dict[str, float]:
    """Measure every model, and return the metrics; those of the compared models are named `model.metric`."""
    evaluation = Evaluation(context, tools)
    with evaluation.database or nullcontext():
        measured = {one.name: evaluation.measure(number, one) for number, one in enumerate(evaluation.models)}
    if tools.first:
        evaluation.conclude(measured)
    return evaluation.metrics(measured)


class Evaluation:
    """One worker's part of an evaluation. Batches are divided among workers, and do not depend on the world size."""

    def __init__(self, context: StageContext, tools: StageIO) -> None:
        spec, run, where = context.stage.evaluate, context.run, context.where
        assert spec is not None
        self.context, self.tools, self.spec = context, tools, spec
        self.models = contenders(run, context.layout.index, spec, tools.storage)
        places = directories(run)
        self.rows = eval_rows(spec, context.tokenizer, context_length(context.config), where, **places)
        database = spec.database
        self.database = None if database is None else open_database(database, f"{where}.database", **places)
        self.scorer = Scorer(spec, self.database)
        self.options = GenerationOptions.of(spec.generation)
        self.model: Any = None
        cut = sum(row.cut for row in self.rows)
        forms = [row.form for row in self.rows]
        self.notes = [note for one in self.models if (note := form_note(one, forms)) is not None]
        for note in self.notes:
            tools.log(note)
        if cut:
            tools.log(f"the beginning of {cut} of {len(self.rows)} prompts is left out, to leave room for an answer")

    def measure(self, number: int, contender: Contender) -> dict[str, float]:
        """Return a model's metrics, measured now or by an earlier attempt. Every worker gets the same result."""
        log = self._results_log(contender)
        if self.rows and not log.complete:
            self._measure_rows(number, contender, log)
        metrics: dict[str, float] = {}
        if self.rows:
            known = log.known()
            references = [row.reference for row in self.rows]
            metrics |= totals(self.spec, [known[row.number] for row in self.rows], references)
        metrics |= self._tasks(contender)
        self._close()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.tools.log(f"{contender.name}: {shown}")
        return metrics

    def _measure_rows(self, number: int, contender: Contender, log: ResultsLog) -> None:
        known = log.known()
        self.tools.collectives.barrier()  # no worker writes before all have read which rows are done
        todo = batches([row for row in self.rows if row.number not in known], self.spec.per_device_eval_batch_size)
        workers, rank = self.context.placement.world_size, self.context.placement.rank
        for first in range(0, len(todo), workers):
            mine = todo[first + rank : first + rank + 1]
            for batch in mine:
                log.add(self._batch(self._open(contender), batch))
            done = len(known) + sum(map(len, todo[: first + workers]))
            self.tools.progress(number * len(self.rows) + done, len(self.models) * len(self.rows))
            self.tools.stop_together()
        self.tools.collectives.barrier()
        if self.tools.first:
            known = log.known()
            log.finish([known[row.number] for row in self.rows])
        self.tools.collectives.barrier()

    def _results_log(self, contender: Contender) -> ResultsLog:
        keys = {row.number: row.key for row in self.rows}
        return ResultsLog(self.tools.storage, self.context.layout, contender.name, keys)

    def _batch(self, model: Any, batch: list[EvalRow]) -> list[Row]:
        found: list[Row] = [{"row": row.number, "key": row.key} for row in batch]
        if PERPLEXITY in self.spec.metrics:
            pad = self.context.tokenizer.pad_token_id or 0
            for one, (nll, tokens) in zip(found, likelihoods(model, batch, pad), strict=True):
                one |= {"nll": nll, "tokens": tokens}
        if self.spec.generates:
            self._answer(model, batch, found)
        return found

    def _answer(self, model: Any, batch: list[EvalRow], found: list[Row]) -> None:
        prompts, keys = [list(row.prompt) for row in batch], [row.number for row in batch]
        tokenizer = self.context.tokenizer
        answers = generate_batch(model, tokenizer, prompts, self.options, self.spec.seed, keys=keys)
        for one, row, answer in zip(found, batch, answers, strict=True):
            one |= {"answer": answer.text, "finished": answer.finished}
            one |= self.scorer.score(answer.text, row.reference)

    def _tasks(self, contender: Contender) -> dict[str, float]:
        """Return the metrics of the tasks. Rank 0 measures each task once, and saves its result for later attempts."""
        metrics: dict[str, float] = {}
        for task in self.spec.tasks:
            kept = self.context.layout.task(contender.name, task)
            if self.tools.first and not self.tools.storage.exists(kept):
                self.tools.log(f"{contender.name}: {task}")
                model, base_dir = self._open(contender), self.context.run.base_dir
                found = run_tasks(model, self.context.tokenizer, self.spec, [task], base_dir)
                self.tools.storage.write_text(kept, json.dumps(found, indent=1))
            self.tools.stop_together()
            metrics |= json.loads(self.tools.storage.read_text(kept))
        return metrics

    def conclude(self, measured: Measured) -> None:
        """Write the metrics of all models, with samples of their answers."""
        evaluation = {
            "model": self.models[0].name,
            "models": measured,
            "rows": len(self.rows),
            "cut_prompts": sum(row.cut for row in self.rows),
            "notes": self.notes,
            "samples": self._samples(),
        }
        self.tools.storage.write_text(self.context.layout.evaluation, json.dumps(evaluation, indent=1))

    def metrics(self, measured: Measured) -> dict[str, float]:
        """Return all metrics in one dict; those of the compared models are named `model.metric`."""
        others = (one.name for one in self.models[1:])
        compared = {f"{name}.{metric}": value for name in others for metric, value in measured[name].items()}
        return measured[self.models[0].name] | compared

    def _samples(self) -> list[dict[str, Any]]:
        if not self.spec.generates:
            return []
        journals = {one.name: self._results_log(one).known() for one in self.models}
        return [
            {
                "prompt": row.shown,
                "reference": row.reference,
                "answers": {name: _sample(known[row.number]) for name, known in journals.items()},
            }
            for row in self.rows[:SAMPLES]
        ]

    def _open(self, contender: Contender) -> Any:
        """Return the contender's model, loaded at the first call."""
        if self.model is None:
            self.model = open_model(contender, self.context, self.spec)
        return self.model

    def _close(self) -> None:
        self.model = None
        reset_stage_state()


def _sample(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("answer", "scores", "error") if name in row}
