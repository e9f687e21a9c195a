"""Checks the gate of an evaluation: whether the model is good enough for the next stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_api.runconfig import RunConfig
from finetune_api.stages import Gate
from finetune_trainer.errors import GateNotPassed
from finetune_trainer.stage_graph import layouts, place
from finetune_trainer.storage.filesystem import Storage

Measured = dict[str, dict[str, float]]
"""Metrics by name of the model."""


@dataclass(frozen=True)
class Verdict:
    """The result of one bound of a gate."""

    gate: Gate
    value: float | None
    """The metric, or its difference to that of another model; None if it was not measured."""

    @property
    def passed(self) -> bool:
        """Whether the value is within the bound. None and NaN are not."""
        value, gate = self.value, self.gate
        if value is None:
            return False
        reached = gate.at_least is None or value >= gate.at_least
        return reached and (gate.at_most is None or value <= gate.at_most)

    @property
    def expected(self) -> str:
        """The bound for a message, such as `at least 0.5`."""
        bounds = (("at least", self.gate.at_least), ("at most", self.gate.at_most))
        return " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)

    @property
    def subject(self) -> str:
        """The metric for a message, such as `rougeL` or `rougeL minus base's`."""
        return self.gate.metric + (f" minus {self.gate.relative_to}'s" if self.gate.relative_to else "")

    def __str__(self) -> str:
        value = "was not measured" if self.value is None else f"is {self.value:.6g}"
        return f"{self.subject} {value}, expected {self.expected}"


def verdicts(gates: list[Gate], measured: Measured, model: str) -> list[Verdict]:
    """Return the verdict of each bound on `model`."""
    return [Verdict(gate, _value(gate, measured, model)) for gate in gates]


def require_gate(run: RunConfig, storage: Storage, index: int) -> None:
    """Check the metrics of a finished stage against its gate. Stages without a gate pass.

    Raises:
        GateNotPassed: the stage missed a bound; the message names all bounds that it missed.
    """
    spec = run.job.spec.stages[index].evaluate
    if spec is None or not spec.gate:
        return
    evaluation = json.loads(storage.read_text(layouts(run)[index].evaluation))
    found = verdicts(spec.gate, evaluation["models"], evaluation["model"])
    missed = list(_missed(found, f"{place(run, index)}.gate", evaluation["model"]))
    if missed:
        raise GateNotPassed("\n".join(missed))


def _missed(found: list[Verdict], where: str, model: str) -> Iterator[str]:
    for index, verdict in enumerate(found):
        if not verdict.passed:
            yield f"{where}[{index}]: {verdict} ({model})"


def _value(gate: Gate, measured: Measured, model: str) -> float | None:
    value = measured[model].get(gate.metric)
    if gate.relative_to is None or value is None:
        return value
    other = measured[gate.relative_to].get(gate.metric)
    return None if other is None else value - other
