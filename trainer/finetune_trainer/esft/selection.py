"""Select the experts to train: the algorithm of ESFT (arXiv 2407.01906, section 3.2) as in its reference code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune_api.problems import Problem, did_you_mean
from finetune_trainer.errors import UserError

Score = Literal["token", "gate"]
DECIMALS = 4
"""Decimals to which scores are rounded before comparison; without rounding, one published selection differs."""


@dataclass(frozen=True)
class ExpertConfig:
    """The trained parts of a model: expert ids by layer, in the order of their scores."""

    experts: Mapping[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Its origin, such as `score` and `threshold`; saved in the file, without effect on training."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of the reference code's `expert_config.json`, with the notes."""
        experts = {str(layer): list(ids) for layer, ids in self.experts.items()}
        switches = {"shared_experts": self.shared_experts, "non_expert_modules": self.non_expert_modules}
        return {"experts": experts, **switches, **self.notes}


def select(scores: Sequence[float], threshold: float) -> tuple[int, ...]:
    """Select experts by descending score (ties: lower id first) until the sum of scores reaches the threshold.

    Args:
        scores: one layer's scores by expert id.
        threshold: the paper's p; the expert that crosses it is selected too.
    """
    rounded = [round(score, DECIMALS) for score in scores]
    chosen: list[int] = []
    total = 0.0
    for expert in sorted(range(len(rounded)), key=lambda expert: (-rounded[expert], expert)):
        if total >= threshold:
            break
        chosen.append(expert)
        total += rounded[expert]
    return tuple(chosen)


def select_layers(scores: Mapping[int, Sequence[float]], threshold: float) -> dict[int, tuple[int, ...]]:
    """Select experts in each layer separately."""
    return {layer: select(values, threshold) for layer, values in scores.items()}


def read_scores(path: Path, score: Score, where: str = "") -> dict[int, list[float]]:
    """Read scores by layer and expert id: our score file, the reference code's `summary.json`, or one table of it.

    A layer is an object by expert id, in any order, or a list. Layers keep the file's order.

    Args:
        where: the field for error messages. Default: the file.

    Raises:
        UserError: the file does not exist or has another format.
    """
    where = where or str(path)
    data = _read_object(path, where)
    key = f"{score}_scores"
    if data and all(name.isdecimal() for name in data):
        data = {key: data}
    if key not in data:
        raise UserError([Problem(where, f"{path} has no `{key}`{did_you_mean(key, data)}")])
    try:
        return {int(layer): _by_id(values) for layer, values in data[key].items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        example = '{"token_scores": {"1": {"0": 0.0101, ...}, ...}}'
        raise UserError([Problem(where, f"expected scores by layer and expert, such as {example}")]) from error


def read_config(path: Path, where: str = "expertConfig.file") -> ExpertConfig:
    """Read an `expert_config.json`.

    Raises:
        UserError: the file does not exist or has another format.
    """
    return config_from(_read_object(path, where), where)


def config_from(data: Mapping[str, Any], where: str) -> ExpertConfig:
    """Return the configuration in a JSON object.

    Raises:
        UserError: the object has another format.
    """
    known = {"experts", "shared_experts", "non_expert_modules"}
    try:
        experts = {int(layer): tuple(_id(value) for value in ids) for layer, ids in data["experts"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        if "token_scores" in data or "gate_scores" in data:
            raise UserError([Problem(where, "is a score file: set it as expertConfig.scores")]) from error
        example = '{"experts": {"1": [8, 26], ...}}'
        raise UserError([Problem(where, f"expected expert ids by layer, such as {example}")]) from error
    notes = {name: value for name, value in data.items() if name not in known}
    shared, others = (data.get(name, False) is True for name in ("shared_experts", "non_expert_modules"))
    return ExpertConfig(experts, shared, others, notes)


def score_problems(scores: Mapping[int, Sequence[float]], sizes: Mapping[int, int], where: str) -> list[Problem]:
    """Return the problems of a score file with a model.

    Args:
        sizes: number of experts by layer of the model.
    """
    return [
        Problem(where, f"layer {layer} has scores of {len(row)} experts, but the model has {sizes[layer]}")
        for layer, row in scores.items()
        if layer in sizes and len(row) != sizes[layer]
    ]


def config_problems(config: ExpertConfig, sizes: Mapping[int, int], where: str) -> list[Problem]:
    """Return the problems of an expert configuration with a model.

    Args:
        sizes: number of experts by layer of the model.
    """
    problems = []
    for layer, ids in config.experts.items():
        if layer not in sizes:
            layers = ", ".join(map(str, sorted(sizes)))
            problems.append(Problem(where, f"layer {layer} has no routed experts; layers with experts: {layers}"))
            continue
        wrong = sorted({expert for expert in ids if not 0 <= expert < sizes[layer]})
        if wrong:
            message = f"layer {layer} has experts 0 to {sizes[layer] - 1}, not {', '.join(map(str, wrong))}"
            problems.append(Problem(where, message))
        if len(set(ids)) < len(ids):
            problems.append(Problem(where, f"layer {layer} names an expert twice"))
    if not any(config.experts.values()) and not config.shared_experts and not config.non_expert_modules:
        problems.append(Problem(where, "no expert is selected: there is nothing to train"))
    return problems


def _by_id(values: Mapping[str, float] | Sequence[float]) -> list[float]:
    if isinstance(values, list):
        return [_score(value) for value in values]
    by_id = {int(expert): _score(value) for expert, value in values.items()}  # type: ignore[union-attr]
    return [by_id[expert] for expert in range(len(by_id))]


def _score(value: Any) -> float:
    score = float(value)
    if not (math.isfinite(score) and score >= 0):
        raise ValueError(f"{value!r} is not a score")
    return score


def _id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not an expert id")
    return value


def _read_object(path: Path, where: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError([Problem(where, f"can't read {path}: {error.strerror}")]) from error
    except ValueError as error:
        raise UserError([Problem(where, f"{path} is not valid JSON: {error}")]) from error
    if not isinstance(data, dict):
        raise UserError([Problem(where, f"{path} holds a {type(data).__name__}, expected an object")])
    return data
