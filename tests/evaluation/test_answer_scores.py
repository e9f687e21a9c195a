"""Scores of answers compared with reference libraries and by hand, metric names of tasks, and bounds of a gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from finetune_api.stages import EvaluateSpec, Gate
from finetune_trainer.evaluation.harness_tasks import task_metrics, task_problems
from finetune_trainer.evaluation.scores import Scorer, perplexity, totals
from finetune_trainer.gate import verdicts

DATA = {"sources": [{"inline": [{"prompt": "a", "completion": "b"}]}]}
ANSWERS = ["The cat sat on a mat.", "no idea", ""]
REFERENCES = ["The cat sat on the mat.", "MATCH (n) RETURN n", "yes"]
ALL = ["rouge1", "rouge2", "rougeL", "rougeLsum", "exactMatch", "bleu", "chrf"]


def spec(**fields: Any) -> EvaluateSpec:
    return EvaluateSpec.model_validate({"data": DATA, "metrics": ALL, **fields})


def test_totals_are_the_libraries_own() -> None:
    given = spec()
    scorer = Scorer(given, None)
    rows = [{"answer": a, **scorer.score(a, r)} for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    found = totals(given, rows, REFERENCES)
    assert list(found) == ALL
    rouge = RougeScorer(["rouge1", "rougeL"])
    each = [rouge.score(r, a) for a, r in zip(ANSWERS, REFERENCES, strict=True)]
    assert found["rougeL"] == pytest.approx(sum(one["rougeL"].fmeasure for one in each) / 3, abs=1e-15)
    assert found["rouge1"] == pytest.approx(sum(one["rouge1"].fmeasure for one in each) / 3, abs=1e-15)
    assert 0 < found["rouge2"] < found["rougeL"] < 1
    assert found["bleu"] == corpus_bleu(ANSWERS, [REFERENCES]).score
    assert found["chrf"] == corpus_chrf(ANSWERS, [REFERENCES]).score
    assert found["exactMatch"] == 0


@pytest.mark.parametrize(
    ("fields", "answer", "reference", "right"),
    [
        ({}, " a\n  b\t", "a b", True),
        ({}, "cafe\u0301", "caf\u00e9", True),
        ({}, "A b", "a b", False),
        ({}, "a b.", "a b", False),
        ({"ignoreCase": True}, "STRASSE", "stra\u00dfe", True),
        ({"ignorePunctuation": True}, "a, b.", "a b", True),
        ({"ignorePunctuation": True}, "A, b.", "a b", False),
    ],
)
def test_exact_match_is_exact_but_for_white_space(
    fields: dict[str, Any], answer: str, reference: str, right: bool
) -> None:
    assert Scorer(spec(**fields), None).score(answer, reference)["scores"]["exactMatch"] == float(right)


def test_perplexity_is_by_token_in_any_order() -> None:
    nlls, tokens = [0.1, 1e9, 0.2, 3.3], [1, 10**9, 2, 3]
    assert perplexity(nlls, tokens) == perplexity(nlls[::-1], tokens[::-1])
    assert perplexity([math.log(4) * 3, math.log(2) * 6], [3, 6]) == pytest.approx(4 ** (1 / 3) * 2 ** (2 / 3))
    assert perplexity([1e6], [1]) == math.inf


def test_a_tasks_metrics_have_its_name() -> None:
    results = {
        "hellaswag": {"alias": "hellaswag", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5},
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": "N/A"},
    }
    assert task_metrics(results) == {
        "hellaswag.acc": 0.25,
        "hellaswag.acc_norm": 0.5,
        "gsm8k.exact_match.strict-match": 0.1,
    }


def test_tasks_without_the_harness_are_told_before() -> None:
    try:
        import lm_eval  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        [problem] = task_problems(spec(tasks=["hellaswag"]), "stages[1].evaluate", "/")
        assert str(problem).startswith(
            "stages[1].evaluate.tasks: needs lm-evaluation-harness: install finetune-operator"
        )
    else:
        [problem] = task_problems(spec(tasks=["hellaswg", "hellaswag"]), "stages[1].evaluate", "/")
        assert str(problem).startswith("stages[1].evaluate.tasks[0]: ") and "did you mean `hellaswag`?" in str(problem)
        [problem] = task_problems(spec(tasks=["mine"], includePath="nowhere"), "stages[1].evaluate", "/")
        assert str(problem) == "stages[1].evaluate.includePath: no such directory: nowhere"
    assert task_problems(spec(), "stages[1].evaluate", "/") == []


@pytest.mark.parametrize(
    ("gate", "passed", "words"),
    [
        ({"metric": "rougeL", "atLeast": 0.5}, True, "rougeL is 0.5, expected at least 0.5"),
        ({"metric": "rougeL", "atLeast": 0.51}, False, "rougeL is 0.5, expected at least 0.51"),
        ({"metric": "rougeL", "atLeast": 0.1, "atMost": 0.4}, False, "expected at least 0.1 and at most 0.4"),
        ({"metric": "rougeL", "atLeast": 0.3, "relativeTo": "base"}, True, "rougeL minus base's is 0.375, expected"),
        ({"metric": "perplexity", "atMost": 1, "relativeTo": "base"}, False, "perplexity minus base's is 2,"),
        ({"metric": "odd", "atMost": 1}, False, "odd is nan"),
        ({"metric": "none", "atMost": 1}, False, "none was not measured, expected at most 1"),
        ({"metric": "new", "atMost": 1, "relativeTo": "base"}, False, "new minus base's was not measured"),
    ],
)
def test_a_bound_says_what_it_found(gate: dict[str, Any], passed: bool, words: str) -> None:
    measured = {
        "sft": {"rougeL": 0.5, "perplexity": 5.0, "odd": math.nan, "new": 0.0},
        "base": {"rougeL": 0.125, "perplexity": 3.0},
    }
    [verdict] = verdicts([Gate.model_validate(gate)], measured, "sft")
    assert (verdict.passed, words in str(verdict)) == (passed, True), str(verdict)
