"""Single and combined rewards, and how judges use them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import UserError
from finetune_trainer.rewards.combined import NamedReward, columns_of, weighted
from finetune_trainer.rewards.from_spec import import_function
from finetune_trainer.rewards.functions import ExactMatch, PatternMatch, load_function
from finetune_trainer.rewards.judge import RewardJudge, best_and_worst, win_rate


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_right_answers() -> None:
    reward = ExactMatch("answer")
    assert reward(completions=[" 4\n", "5", "x"], answer=["4", 4, None]) == [1.0, 0.0, None]
    assert reward(completions=[_said("4")], answer=["4 "]) == [1.0]


def test_patterns() -> None:
    assert PatternMatch(r"^\s*\{")(completions=[' {"a": 1}', "no", _said("{}")]) == [1.0, 0.0, 1.0]


def test_weights_and_answers_without_a_number() -> None:
    assert weighted([[1.0, None, None], [0.5, 2.0, None]], [2.0, 1.0]) == [2.5, 2.0, None]
    assert columns_of([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}


async def _asynchronous(completions: list[str], **_: Any) -> list[float]:
    return [float(len(one)) for one in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [1.0], r"returned 1 rewards for 2 completions"),
        (lambda **_: [1.0, "good"], r"returned 'good' for a completion, expected a number or None"),
        (lambda **_: [float("nan"), 1.0], r"returned nan for a completion"),
    ],
)
def test_functions_that_give_something_else(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"stages\[2\].rlhf.rewards\[0\]: {message}"):
        NamedReward("mine", function, 1.0, "stages[2].rlhf.rewards[0]")(["p", "p"], ["a", "b"])


def test_functions_may_be_asynchronous() -> None:
    assert NamedReward("mine", _asynchronous, 1.0, "x")(["p", "p"], ["a", "bb"]) == [1.0, 2.0]


def test_modules_beside_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_job.py").write_text("def good(**_):\n    return [1.0]\nNUMBER = 3\n")
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    assert load_function("beside_the_job:good", str(tmp_path))() == [1.0]
    for path, message in {
        "beside_the_job:bad": "has no attribute 'bad'",
        "beside_the_job:NUMBER": "is a int, expected a function",
        "nowhere_at_all:good": "No module named 'nowhere_at_all'",
        "broken_module:good": "can't be imported: ZeroDivisionError",
    }.items():
        with pytest.raises(UserError, match=message):
            import_function(path, str(tmp_path), "here")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 3.0, 2.0], (1, 0)),
        ([2.0, 3.0, 3.0, 2.0], (1, 0)),
        ([1.0, 1.0], None),
        ([None, 1.0, None, 0.0], (1, 3)),
        ([None, None], None),
        ([None, 4.0], None),
    ],
)
def test_best_and_worst(scores: list[float | None], expected: tuple[int, int] | None) -> None:
    assert best_and_worst(scores) == expected


def test_win_rate() -> None:
    assert win_rate([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [None, 5.0]]) == [1.0, 0.0, 0.5]


def test_a_reward_as_a_judge() -> None:
    """The judge passes each answer with its own prompt and columns, and returns the scores in the right groups."""

    def reward(prompts: list[str], completions: list[str], bonus: list[int], **_: Any) -> list[float]:
        return [float(f"{prompt}{text}") + more for prompt, text, more in zip(prompts, completions, bonus, strict=True)]

    judge = RewardJudge(NamedReward("mine", reward, 1.0, "x"))
    scores = judge(["1", "2"], [["0", "1"], ["5", "6"]], [[[0], [0]], [[0], [0]]], [{"bonus": 100}, {"bonus": 0}])
    assert scores == [[110.0, 111.0], [25.0, 26.0]]
