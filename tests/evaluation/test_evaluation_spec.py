"""Which `evaluate` stages are rejected, and with which messages."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_api.validation import check_job

DATA = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}
GOOD = {"data": DATA, "metrics": ["rougeL", "perplexity"], "compareWith": ["base", "first"]}


def job(evaluate: dict[str, Any]) -> dict[str, Any]:
    stages: list[dict[str, Any]] = [
        {"name": "first", "sft": {"data": DATA}},
        {"dpo": {"data": DATA}},
        {"evaluate": copy.deepcopy(GOOD) | evaluate},
        {"name": "last", "sft": {"data": DATA}},
    ]
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {"model": {"hub": "a/b"}, "stages": stages},
    }


def problems(**evaluate: Any) -> list[str]:
    return [str(problem) for problem in check_job(job(evaluate))[1]]


def test_a_good_one_is_accepted() -> None:
    gate = [{"metric": "rougeL", "atLeast": 0.5}, {"metric": "boolq.acc", "atMost": 0.9, "relativeTo": "first"}]
    assert problems(gate=gate, tasks=["boolq"]) == []


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"metrics": ["rougel"]}, "stages[2].evaluate.metrics[0]: got 'rougel', expected one of perplexity, "),
        ({"metrics": ["eval_rougeL"]}, "did you mean rougeL?"),
        ({"gate": [{"metric": "rougel", "atLeast": 1}]}, "gate[0].metric: 'rougel' is not measured: did you mean `r"),
        ({"gate": [{"metric": "bleu", "atLeast": 1}]}, "gate[0].metric: 'bleu' is not measured; expected one of "),
        ({"gate": [{"metric": "rougeL"}]}, "stages[2].evaluate.gate[0]: set atLeast or atMost"),
        (
            {"gate": [{"metric": "rougeL", "atLeast": 1, "relativeTo": "frist"}]},
            "gate[0].relativeTo: 'frist' is not in compareWith: did you mean `first`?",
        ),
        ({"compareWith": ["frist"]}, "stages[2].evaluate.compareWith[0]: 'frist' is not an earlier stage: did you"),
        ({"compareWith": ["last"]}, "compareWith[0]: 'last' is not an earlier stage"),
        ({"compareWith": ["dpo"]}, "compareWith[0]: 'dpo' is the evaluated model itself"),
        ({"metrics": []}, "stages[2].evaluate: set metrics, tasks or both"),
        ({"data": None}, "stages[2].evaluate: metrics need data"),
        ({"metrics": ["executionAccuracy"]}, "metric executionAccuracy needs database"),
        ({"database": {"sql": "x"}}, "database needs metric executionAccuracy"),
        ({"database": {}, "metrics": ["executionAccuracy"]}, "set exactly one of file, script, sql"),
        ({"data": DATA | {"streaming": True}}, "stages[2].evaluate: evaluation data cannot be streamed"),
        ({"generation": {"topK": 3}}, "stages[2].evaluate.generation: topK without doSample"),
    ],
)  # fmt: skip
def test_faults_name_what_was_meant(evaluate: dict[str, Any], message: str) -> None:
    found = problems(**evaluate)
    assert any(message in problem for problem in found), found
