"""Measuring a model, and stopping a pipeline whose model is not good enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, expects, not_exactly_one, rules
from finetune_api.data import DataSpec, StageName
from finetune_api.declaration import Produces, RowKind
from finetune_api.generation import Generation
from finetune_api.model import Path
from finetune_api.problems import did_you_mean
from finetune_api.stages.non_training import BesideSpec
from finetune_api.training import PositiveInt, Quantization

Metric = Literal[
    "perplexity",
    "exactMatch",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bleu",
    "chrf",
    "executionAccuracy",
]
TaskName = Annotated[
    str,
    Field(
        max_length=128,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$",
        json_schema_extra=expects("the name of a task of lm-evaluation-harness"),
    ),
]
Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
BASE = "base"
"""In `compareWith`: the job's model before any training."""
EXECUTION = "executionAccuracy"
PERPLEXITY = "perplexity"


class Database(ApiModel):
    """The database that generated queries run on, read-only: exactly one of `file`, `script` and `sql`."""

    model_config = rules(exactly_one("file", "script", "sql"))

    engine: Literal["sqlite", "duckdb", "cypher"] = "sqlite"
    """What runs the queries; `cypher` is LadybugDB."""
    file: Path | None = None
    """A database's file."""
    script: Path | None = None
    """A file of statements that make the tables and their rows."""
    sql: Annotated[str, Field(min_length=1, max_length=262_144)] | None = None
    """Statements that make the tables and their rows, in the engine's language."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 10
    """A query that takes longer counts as failed."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "file", "script", "sql")


class Gate(ApiModel):
    """A bound on one metric of the evaluated model."""

    model_config = rules(cel("has(self.atLeast) || has(self.atMost)", "set atLeast or atMost"))

    metric: Annotated[str, Field(min_length=1, max_length=160)]
    """One of `metrics`, or a task's metric, such as `hellaswag.acc_norm`."""
    at_least: Bound | None = None
    """Smallest value that passes."""
    at_most: Bound | None = None
    """Largest value that passes."""
    relative_to: StageName | None = None
    """One of `compareWith`: the bound is on the difference to that model's value. Default: on the value itself."""

    def faults(self) -> Iterator[str]:
        if self.at_least is None and self.at_most is None:
            yield "set atLeast or atMost"


class EvaluateSpec(BesideSpec):
    """Measure the model that the stages before have made, and others beside it; trains nothing."""

    model_config = rules(
        cel("self.metrics.size() + self.tasks.size() > 0", "set metrics, tasks or both"),
        cel("self.metrics.size() == 0 || has(self.data)", "metrics need data"),
        cel("!has(self.data) || !self.data.streaming", "data that is evaluated is not streamed"),
        cel(
            "('executionAccuracy' in self.metrics) == has(self.database)",
            "metric executionAccuracy and database go together",
        ),
        cel(
            "self.gate.all(g, g.metric in self.metrics || self.tasks.exists(t, g.metric.startsWith(t + '.')))",
            "a gate's metric is one of metrics, or a task's, such as hellaswag.acc",
        ),
        cel(
            "self.gate.all(g, !has(g.relativeTo) || g.relativeTo in self.compareWith)",
            "a gate's relativeTo is one of compareWith",
        ),
    )

    data: DataSpec | None = None
    """Rows as `sft` has them; `perplexity` takes plain text too. With `validationSplit` the held-out rows alone: those
    that a stage with the same data did not train on."""
    metrics: Annotated[list[Metric], Field(max_length=16)] = Field(default=[])
    """What is measured on `data`. All but `perplexity` compare generated answers with the rows' own. `bleu` and `chrf`
    are from 0 to 100, all others but `perplexity` from 0 to 1."""
    tasks: Annotated[list[TaskName], Field(max_length=32)] = Field(default=[])
    """Tasks of lm-evaluation-harness, where the package lm-eval is installed."""
    include_path: Path | None = None
    """Directory with definitions of further tasks, as lm-evaluation-harness has them (`--include_path`). Functions that
    they name are run."""
    task_limit: PositiveInt | None = None
    """Examples of each task. Default: all."""
    compare_with: Annotated[list[StageName], Field(max_length=16)] = Field(default=[])
    """What else is measured in the same way: `base`, the job's model before any training, and earlier stages."""
    generation: Generation = Generation()
    """How answers are generated."""
    ignore_case: bool = False
    """Whether `exactMatch` takes upper and lower case for the same."""
    ignore_punctuation: bool = False
    """Whether `exactMatch` leaves out punctuation."""
    database: Database | None = None
    """Where `executionAccuracy` runs the answers and the rows' own queries to compare what they return."""
    gate: Annotated[list[Gate], Field(max_length=16)] = Field(default=[])
    """What must hold for the job to go on: where a bound is missed, the job ends before the next stage."""
    quantization: Quantization | None = None
    """Quantize the models while they are measured. Default: not quantized."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per worker and forward pass."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of sampling."""

    def faults(self) -> Iterator[str]:
        if not self.metrics and not self.tasks:
            yield "set metrics, tasks or both"
        if self.metrics and self.data is None:
            yield "metrics need data"
        if self.data is not None and self.data.streaming:
            yield "data that is evaluated is not streamed"
        if (EXECUTION in self.metrics) != (self.database is not None):
            yield f"metric {EXECUTION} and database go together"
        for index, gate in enumerate(self.gate):
            yield from self._gate_faults(f"gate[{index}]", gate)

    def _gate_faults(self, where: str, gate: Gate) -> Iterator[str]:
        if gate.metric not in self.metrics and not any(gate.metric.startswith(f"{task}.") for task in self.tasks):
            measured = [*self.metrics, *(f"{task}.acc" for task in self.tasks)]
            yield f"{where}.metric: {gate.metric!r} is not measured{did_you_mean(gate.metric, measured)}"
        if gate.relative_to is not None and gate.relative_to not in self.compare_with:
            hint = did_you_mean(gate.relative_to, self.compare_with)
            yield f"{where}.relativeTo: {gate.relative_to!r} is not in compareWith{hint}"

    @property
    def row_kind(self) -> RowKind:
        return "sft"

    @property
    def produces(self) -> Produces:
        return "nothing"

    @property
    def generates(self) -> bool:
        """Whether a metric compares generated answers with references."""
        return any(metric != PERPLEXITY for metric in self.metrics)
