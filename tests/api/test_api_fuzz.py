"""`check_job` and `apply_overrides` report random invalid input with a message and raise no other exception."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import yaml

from finetune_api.overrides import OverrideError, apply_overrides
from finetune_api.validation import check_job

CYCLE: list[Any] = []
CYCLE.append(CYCLE)
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**5000,
    1.5,
    float("nan"),
    float("-inf"),
    "",
    "x" * 5000,
    "ä\u0000\ud800\U0001f600",
    "1e-4",
    [],
    [[]],
    {},
    {"": None},
    {2: 2, None: 3, True: 4, (1, 2): 5, "lr": 6, "learning_rate": 7},
    [None, 1, {"sources": {}}],
    {"sft": {"data": {"sources": [{"inline": [1, {}]}]}, "learningrate": "x"}},
    {1, 2},
    b"bytes",
    object(),
    CYCLE,
]
ROUNDS = 1000


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document."""
    if isinstance(value, dict):
        return [pair for key in value for pair in [(value, key), *places(value[key])]]
    if isinstance(value, list):
        return [pair for index in range(len(value)) for pair in [(value, index), *places(value[index])]]
    return []


def mutate(job: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    job = copy.deepcopy(job)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(job) or [(job, "spec")])
        action = rng.randrange(4)
        if action == 0:
            container[key] = rng.choice(JUNK)
            return job  # the random value may be cyclic, so it is not searched
        if action == 1 and isinstance(container, dict):
            container[rng.choice(["x", "Lr", "", 5, None, str(key).upper(), "a.b[0]", "é" * 200])] = container[key]
        elif action == 2:
            del container[key]
        elif isinstance(container, list):
            container.append(rng.choice(JUNK))
            return job
    return job


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations_never_raise(job: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    faulty = 0
    for _ in range(ROUNDS // 4):
        parsed, found = check_job(mutate(job, rng))
        assert (parsed is None) == bool(found)
        assert len(set(found)) == len(found)
        assert all(len(str(problem)) < 2000 and "\n" not in str(problem) for problem in found)
        faulty += bool(found)
    assert faulty > ROUNDS // 8


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_junk_in_every_place_never_raises(job: dict[str, Any], junk: Any) -> None:
    assert check_job(junk)[1]
    for index in range(len(places(job))):
        broken = copy.deepcopy(job)
        container, key = places(broken)[index]
        container[key] = junk
        parsed, found = check_job(broken)
        assert (parsed is None) == bool(found)


def test_random_assignments_only_raise_override_errors(job: dict[str, Any]) -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(400):
        path = "".join(rng.choices(["stages", "[0]", "[9]", ".", "sft", "[", "]", "=", "spec", "é", " ", "model"], k=4))
        try:
            result = apply_overrides(job, [path + rng.choice(["=1", "", "={", "=[]"])], yaml.safe_load)
        except OverrideError as error:
            refused += 1
            assert str(error).startswith("--set ")
        else:
            assert result != job
    assert 100 < refused < 400
