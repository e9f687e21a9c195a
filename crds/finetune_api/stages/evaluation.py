"""The `evaluate` stage: metrics, tasks and gates."""

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
from finetune_api.stages.non_training import NonTrainingSpec
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
        json_schema_extra=expects("the name of an lm-evaluation-harness task"),
    ),
]
Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
BASE = "base"
"""Value of `compareWith` that means the model of the job before any training."""
EXECUTION = "executionAccuracy"
PERPLEXITY = "perplexity"


class Database(ApiModel):
    """The database on which generated queries run, read-only. Set exactly one of `file`, `script` and `sql`."""

    model_config = rules(exactly_one("file", "script", "sql"))

    engine: Literal["sqlite", "duckdb", "cypher"] = "sqlite"
    """Database engine. `cypher`: LadybugDB."""
    file: Path | None = None
    """A database file."""
    script: Path | None = None
    """A file with statements that create the tables and their rows."""
    sql: Annotated[str, Field(min_length=1, max_length=262_144)] | None = None
    """Statements that create the tables and their rows, in the language of the engine."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 10
    """Timeout of a query in seconds. A query that exceeds it counts as failed."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "file", "script", "sql")


class Gate(ApiModel):
    """A bound on one metric of the evaluated model."""

    model_config = rules(cel("has(self.atLeast) || has(self.atMost)", "set atLeast or atMost"))

    metric: Annotated[str, Field(min_length=1, max_length=160)]
    """One of `metrics`, or a metric of a task, such as `hellaswag.acc_norm`."""
    at_least: Bound | None = None
    """Minimum value that passes."""
    at_most: Bound | None = None
    """Maximum value that passes."""
    relative_to: StageName | None = None
    """One of `compareWith`. The bound then applies to the difference from the value of that model. Default: the bound
    applies to the value itself."""

    def faults(self) -> Iterator[str]:
        if self.at_least is None and self.at_most is None:
            yield "set atLeast or atMost"


class EvaluateSpec(NonTrainingSpec):
    """Evaluate the model of the preceding stages, and compare it with other models. Nothing is trained."""

    model_config = rules(
        cel("self.metrics.size() + self.tasks.size() > 0", "set metrics, tasks or both"),
        cel("self.metrics.size() == 0 || has(self.data)", "metrics need data"),
        cel("!has(self.data) || !self.data.streaming", "evaluation data cannot be streamed: set data.streaming: false"),
        cel(
            "('executionAccuracy' in self.metrics) == has(self.database)",
            "metric executionAccuracy needs database, and database needs metric executionAccuracy",
        ),
        cel(
            "self.gate.all(g, g.metric in self.metrics || self.tasks.exists(t, g.metric.startsWith(t + '.')))",
            "the metric of a gate must be one of metrics, or a metric of a task, such as hellaswag.acc",
        ),
        cel(
            "self.gate.all(g, !has(g.relativeTo) || g.relativeTo in self.compareWith)",
            "relativeTo of a gate must be one of compareWith",
        ),
    )

    data: DataSpec | None = None
    """Rows in the format of `sft`; for `perplexity` also plain text. With `validationSplit`, only the held-out rows are
    used: those that a training stage with the same `data` did not train on."""
    metrics: Annotated[list[Metric], Field(max_length=16)] = Field(default=[])
    """Metrics on `data`. All except `perplexity` compare generated answers with the reference answers of the rows.
    `bleu` and `chrf` range from 0 to 100, the others except `perplexity` from 0 to 1."""
    tasks: Annotated[list[TaskName], Field(max_length=32)] = Field(default=[])
    """Tasks of lm-evaluation-harness. They need the package lm-eval."""
    include_path: Path | None = None
    """Directory with additional task definitions of lm-evaluation-harness (its option `--include_path`). Python
    functions that they reference are executed."""
    task_limit: PositiveInt | None = None
    """Maximum number of examples per task. Default: all."""
    compare_with: Annotated[list[StageName], Field(max_length=16)] = Field(default=[])
    """Other models to evaluate in the same way: `base`, which is the model of the job before any training, and names of
    earlier stages."""
    generation: Generation = Generation()
    """Generation of answers."""
    ignore_case: bool = False
    """Whether `exactMatch` ignores case."""
    ignore_punctuation: bool = False
    """Whether `exactMatch` ignores punctuation."""
    database: Database | None = None
    """Database on which `executionAccuracy` runs the generated and the reference queries to compare their results."""
    gate: Annotated[list[Gate], Field(max_length=16)] = Field(default=[])
    """Bounds that must hold. If one is missed, the job fails before the next stage."""
    quantization: Quantization | None = None
    """Quantize the models during evaluation. Default: no quantization."""
    per_device_eval_batch_size: PositiveInt = 8
    """Batch size per worker and forward pass."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of sampling."""

    def faults(self) -> Iterator[str]:
        if not self.metrics and not self.tasks:
            yield "set metrics, tasks or both"
        if self.metrics and self.data is None:
            yield "metrics need data"
        if self.data is not None and self.data.streaming:
            yield "evaluation data cannot be streamed: set data.streaming: false"
        if (EXECUTION in self.metrics) != (self.database is not None):
            yield f"metric {EXECUTION} needs database, and database needs metric {EXECUTION}"
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
