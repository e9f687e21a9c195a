"""Build the view of an evaluation: metrics by model, results of the gate, answers side by side. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api.stages import Gate
from finetune_trainer.gate import Verdict, verdicts
from finetune_trainer.progress.formatting import clean, number
from finetune_trainer.report.bars import Bars
from finetune_trainer.report.collect import StageRecord, is_number
from finetune_trainer.report.text_cleaning import Excerpt, Turn, excerpt, turns

LESS_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Cell:
    """One model's value of one metric; empty if it has none.

    The cell of a model that is compared includes the difference to the evaluated model.
    """

    value: str
    change: str = ""
    """Evaluated model minus this one."""
    better: bool | None = None
    """Whether the evaluated model is better than this one; None if they are equal or not comparable."""


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt."""

    model: str
    text: Excerpt | None
    right: bool | None
    """Whether the answer is correct; None if no metric decides it."""
    scores: str
    error: str


@dataclass(frozen=True)
class Question:
    """One prompt with its reference and every model's answer."""

    prompt: list[Turn]
    reference: Excerpt | None
    answers: list[Answer]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as the page shows it."""

    model: str
    """Name of the evaluated model."""
    others: list[str]
    metrics: list[tuple[str, list[Cell]]]
    """Each metric with a cell for each model, the evaluated one first."""
    gate: list[tuple[str, bool]]
    """Text of each bound, and whether it is passed."""
    questions: list[Question]
    facts: list[tuple[str, str]]
    bars: list[Bars]
    notes: list[str]

    @property
    def passed(self) -> bool:
        """Whether every bound is passed."""
        return all(passed for _, passed in self.gate)


def evaluation(stage: StageRecord, gates: Any) -> Evaluation | None:
    """Return the evaluation of a stage, or None if it has none.

    Args:
        gates: the stage's `gate` field in the configuration.
    """
    given, model = stage.evaluation, stage.evaluation.get("model")
    models = {str(name): _numbers(values) for name, values in _object(given.get("models")).items()}
    if not isinstance(model, str) or model not in models:
        return None
    names = [model, *(name for name in models if name != model)]
    metrics = list(models[model])
    return Evaluation(
        clean(model),
        [clean(name) for name in names[1:]],
        [(clean(metric), [_cell(metric, models, model, name) for name in names]) for metric in metrics],
        [(clean(str(verdict)), verdict.passed) for verdict in _verdicts(gates, models, model)],
        [_question(sample, names) for sample in _rows(given.get("samples"))],
        _facts(given),
        _bars(metrics, models, names),
        [clean(str(note)) for note in notes] if isinstance(notes := given.get("notes"), list) else [],
    )


def _verdicts(gates: Any, models: dict[str, dict[str, float]], model: str) -> list[Verdict]:
    try:
        bounds = [Gate.model_validate(gate) for gate in _rows(gates)]
        return verdicts(bounds, models, model)
    except (ValidationError, KeyError, TypeError):  # the configuration is of another version
        return []


def _cell(metric: str, models: dict[str, dict[str, float]], model: str, name: str) -> Cell:
    value = models[name].get(metric)
    if value is None:
        return Cell("")
    if name == model:
        return Cell(number(value))
    change = models[model][metric] - value
    if change == 0 or change != change:
        return Cell(number(value), "±0" if change == 0 else "")
    less = metric.rpartition(".")[2] in LESS_IS_BETTER
    sign = "+" if change > 0 else "\N{MINUS SIGN}"
    return Cell(number(value), sign + number(abs(change)), (change < 0) is less)


def _question(sample: dict[str, Any], names: list[str]) -> Question:
    answers = _object(sample.get("answers"))
    found = [_answer(name, _object(answers[name])) for name in names if name in answers]
    return Question(turns(sample.get("prompt")), excerpt(sample.get("reference")), found)


def _answer(name: str, given: dict[str, Any]) -> Answer:
    scores = _numbers(given.get("scores"))
    verdict = scores.get("executionAccuracy", scores.get("exactMatch"))
    shown = " · ".join(f"{clean(metric)} {number(value)}" for metric, value in scores.items())
    right = None if verdict is None else verdict == 1
    return Answer(clean(name), excerpt(given.get("answer")), right, shown, clean(str(given.get("error") or "")))


def _facts(given: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("Rows measured", given.get("rows")), ("Prompts cut to fit", given.get("cut_prompts"))]
    return [(name, str(value)) for name, value in facts if is_number(value) and value]


def _bars(metrics: list[str], models: dict[str, dict[str, float]], names: list[str]) -> list[Bars]:
    """Return one bar chart for each metric if several models were measured."""
    if len(names) < 2:
        return []
    return [
        Bars(clean(metric), {clean(name): models[name][metric] for name in names if metric in models[name]})
        for metric in metrics
    ]


def _numbers(value: Any) -> dict[str, float]:
    return {str(name): float(one) for name, one in _object(value).items() if is_number(one)}


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _object(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
