"""A judge behind an endpoint that fails, stalls and returns garbage: ratings are right or missing, and charged once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.synthesis.faulty_teacher import FaultyTeacher

from finetune_api.endpoint import Endpoint
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.rewards.endpoint_judge import EndpointJudge, read_scores, shown_order
from finetune_trainer.storage.filesystem import Storage

PROMPTS = [[{"role": "user", "content": f"Question {number}"}] for number in range(12)]
ANSWERS = [
    [[{"role": "assistant", "content": f"worth {(number + at) % 4}"}] for at in range(4)] for number in range(12)
]
RIGHT = [[float((number + at) % 4) for at in range(4)] for number in range(12)]


def _rates(body: dict[str, Any]) -> str:
    """Rate each answer by the number in it, in the order of the prompt."""
    return json.dumps({"scores": [int(found) for found in re.findall(r"worth (\d)", body["messages"][0]["content"])]})


def _judge(server: FaultyTeacher, tmp_path: Path) -> EndpointJudge:
    endpoint = Endpoint.model_validate({"baseUrl": server.url, "model": "teacher", "timeoutSeconds": 2.0})
    storage = Storage(str(tmp_path / "runs"))
    return EndpointJudge(endpoint, "stages[1].online.judge.endpoint", None, lambda: Journal(storage, "judge", tmp_path))


def _ask(judge: EndpointJudge, count: int = 12) -> list[list[float | None]]:
    rows: list[Any] = [None] * count
    return judge(PROMPTS[:count], ANSWERS[:count], rows, rows)


def test_ratings_through_faults_and_a_second_run(tmp_path: Path) -> None:
    with FaultyTeacher(_rates, faults=0.4, seed=3, stall=4.0) as server:
        first = _judge(server, tmp_path)
        assert _ask(first, 8) == RIGHT[:8]  # the event loop also serves a second call
        assert _ask(first) == RIGHT
        assert server.fared["good"] < sum(server.fared.values())
        paid = server.charged
        assert _ask(_judge(server, tmp_path)) == RIGHT
        assert server.charged == paid and not server.charged_twice


def test_what_cannot_be_read_is_missing(tmp_path: Path) -> None:
    def odd(body: dict[str, Any]) -> str:
        return "I like them all." if "Question 1\n" in body["messages"][0]["content"] else _rates(body)

    with FaultyTeacher(odd) as server:
        assert _ask(_judge(server, tmp_path), 3) == [RIGHT[0], [None] * 4, RIGHT[2]]
        assert server.charged == 2 + 3


def test_answers_are_shown_in_an_order_of_the_prompts_own() -> None:
    orders = [shown_order(prompt, 4) for prompt in PROMPTS]
    assert orders == [shown_order(prompt, 4) for prompt in PROMPTS]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len({tuple(order) for order in orders}) > 4


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"scores": [1, 2.5]}', [1.0, 2.5]),
        ('Sure!\n```json\n{"scores": ["3", 4]}\n```', [3.0, 4.0]),
        ('{"scores": [1, 2, 3]}', None),
        ('{"scores": [1]}', None),
        ('{"scores": [true, false]}', None),
        ('{"scores": [1, NaN]}', None),
        ('{"scores": {"1": 2}}', None),
        ("{}", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_reading_scores(text: str, scores: list[float] | None) -> None:
    assert read_scores(text, 2) == scores
