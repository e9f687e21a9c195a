"""Generate training data with a teacher model; `finetune_trainer.synthesis` has the prompts and the filters."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path

from finetune_api.problems import Problem
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.errors import Interrupted, UserError
from finetune_trainer.queries.sandbox import Sandbox
from finetune_trainer.stages.synthesize.teacher_endpoint import EndpointTeacher
from finetune_trainer.stages.synthesize.teacher_model import ModelTeacher, teacher_name
from finetune_trainer.synthesis.databases import open_sandbox
from finetune_trainer.synthesis.effects import Item
from finetune_trainer.synthesis.material import evaluation_texts, stage_items
from finetune_trainer.synthesis.outcome import account, cleaned, rows_text
from finetune_trainer.synthesis.scheduling import Results, run_in_lockstep
from finetune_trainer.synthesis.teacher_requests import Teacher
from finetune_trainer.training.context import StageContext
from finetune_trainer.training.stage_io import StageIO

SANDBOXES = 2
"""Number of queries that run concurrently on one worker."""


def perform(context: StageContext, tools: StageIO) -> dict[str, float]:
    """Generate the rows; return metrics of their number, yield and cost. Every worker calls this."""
    with ExitStack() as stack:
        return Synthesis(context, tools, stack).run()


class Synthesis:
    """One worker's part of a `synthesize` stage.

    Only the first worker sends requests to an endpoint, because its limits are global. A local model generates on all
    workers.
    """

    def __init__(self, context: StageContext, tools: StageIO, stack: ExitStack) -> None:
        spec = context.stage.synthesize
        assert spec is not None
        self.context, self.tools, self.spec, self._stack = context, tools, spec, stack
        self.where = context.where
        self.base_dir, self.cache_dir = Path(context.run.base_dir), Path(context.run.cache_dir)
        rank = context.placement.rank
        self.scratch = tools.scratch / f"worker-{rank}"
        self.journal = Journal(tools.storage, context.layout.journal, self.scratch, writer=rank)
        tools.collectives.barrier()  # no worker writes before all have read the journal

    def run(self) -> dict[str, float]:
        """Run the stage and return its metrics, which are empty on all workers but rank 0."""
        endpoint = self.spec.teacher.endpoint
        name = endpoint.model if endpoint is not None else teacher_name(self.context, self.spec)
        if endpoint is not None and not self.tools.first:
            self.tools.stop_together()
            self.tools.collectives.barrier()
            return {}
        sandboxes = self._sandboxes(SANDBOXES if endpoint is not None else 1)
        items = self._items(
            Teacher(name, self.spec.teacher.generation, self.spec.max_attempts, self.spec.seed), sandboxes
        )
        if self.journal.found:
            self.tools.log(f"{self.journal.found} answers are there from before")
        results = Results(len(items))
        try:
            if endpoint is not None:
                self._ask_endpoint(EndpointTeacher(endpoint, self.where, self.journal, sandboxes), items, results)
            else:
                self._ask_model(name, items, results, sandboxes)
        finally:
            self.journal.close()
        metrics = self._conclude(name, results) if self.tools.first else {}
        self.tools.collectives.barrier()
        return metrics

    def _ask_endpoint(self, teacher: EndpointTeacher, items: list[Item], results: Results) -> None:
        finished = asyncio.run(teacher.answer_all(items, results, self.tools))
        if not finished:
            self.journal.sync()
        # The other workers wait at this collective.
        if self.tools.collectives.any(not finished):
            raise Interrupted(f"{self.context.layout.title}: stopped; {len(self.journal.answers)} answers are kept")

    def _ask_model(self, name: str, items: list[Item], results: Results, sandboxes: list[Sandbox]) -> None:
        model = ModelTeacher(self.context, self.spec, name, self.journal, sandboxes[0] if sandboxes else None)
        window = self.context.placement.world_size * model.batch_size

        def after() -> None:
            self.tools.progress(results.done, results.total)
            self.tools.stop_together()

        run_in_lockstep(items, lambda effects: model.reply_all(effects, self.tools.collectives), window, results, after)

    def _sandboxes(self, count: int) -> list[Sandbox]:
        pairs = self.spec.text2sql or self.spec.text2cypher
        if pairs is None:
            return []
        at = f"{self.where}.{self.spec.method}.database"
        first = self._stack.enter_context(open_sandbox(pairs.database, at, self.base_dir, self.scratch))
        others = [Sandbox(first.engine, first.path, first.seconds) for _ in range(count - 1)]
        return [first, *map(self._stack.enter_context, others)]

    def _items(self, teacher: Teacher, sandboxes: list[Sandbox]) -> list[Item]:
        sandbox = sandboxes[0] if sandboxes else None
        return stage_items(self.spec, teacher, self.where, self.base_dir, self.cache_dir, sandbox)

    def _conclude(self, name: str, results: Results) -> dict[str, float]:
        """Filter the rows, write them with a report, and return the metrics.

        Raises:
            UserError: no row is left.
        """
        spec, layout = self.spec, self.context.layout
        known = None
        if spec.decontaminate is not None:
            known = evaluation_texts(spec.decontaminate, f"{self.where}.decontaminate", self.base_dir)
        outcomes = cleaned(results.in_order(), spec, known)
        told = account(outcomes, results.total, spec, name, self.journal.answers.values())
        self.tools.storage.write_text(layout.synthesis, json.dumps(told, indent=1, ensure_ascii=False))
        if not told["rows"]:
            why = ", ".join(f"{count} times: {reason}" for reason, count in told["rejected"].items())
            raise UserError([Problem(self.where, f"no row could be made: {why or 'nothing was answered'}")])
        self.tools.storage.write_text(layout.rows, rows_text(outcomes))
        self.tools.log(f"{told['rows']} rows of {told['outcomes']} ({told['yield']:.0%}), {_cost_line(told['cost'])}")
        return {
            "rows": float(told["rows"]),
            "rejected": float(told["outcomes"] - told["rows"]),
            "yield": told["yield"],
            "calls": float(told["cost"]["answers"]),
            "prompt_tokens": float(told["cost"]["prompt_tokens"]),
            "completion_tokens": float(told["cost"]["completion_tokens"]),
            **({"price": told["cost"]["price"]} if told["cost"]["price"] is not None else {}),
        }


def _cost_line(cost: dict[str, float]) -> str:
    tokens = f"{cost['answers']} answers, {cost['prompt_tokens']} + {cost['completion_tokens']} tokens"
    return tokens if cost["price"] is None else f"{tokens}, price {cost['price']:.4g}"
