"""The prompts of each worker and step, and the pairs that an `online` stage trains on, for any number of workers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from finetune_api.stages import OnlineSpec
from finetune_trainer.plan.rounds import schedule
from finetune_trainer.training.prompt_feed import EvenDivision, FullSteps


@pytest.mark.parametrize(
    ("rows", "most", "workers"), [(8, 2, 2), (8, 2, 1), (8, 3, 3), (5, 2, 2), (2, 4, 3), (7, 1, 4)]
)
def test_each_prompt_counts_once(rows: int, most: int, workers: int) -> None:
    """In every pass all workers have equally many rows; the rows that count are each row of the step once."""
    divisions = [EvenDivision(rows, most, workers, rank) for rank in range(workers)]
    parts = [division.counted(rows) for division in divisions]
    assert len({tuple(len(keys) for keys, _ in part) for part in parts}) == 1
    assert all(1 <= len(keys) <= most for part in parts for keys, _ in part)
    counted = torch.cat([keys[real] for part in parts for keys, real in part])
    assert sorted(counted.tolist()) == list(range(rows))
    for division, part in zip(divisions, parts, strict=True):
        for positions, (keys, real) in zip(division.share(rows), part, strict=True):
            assert torch.equal(positions[real], keys[real])
            assert all(0 <= position < rows for position in positions.tolist())


def test_steps_are_full_and_come_again() -> None:
    samplers = [FullSteps(5, EvenDivision(4, 1, 2, rank), seed=3, repeats=2) for rank in range(2)]
    passes = [list(sampler) for sampler in samplers]
    assert [len(one) for one in passes] == [len(sampler) for sampler in samplers] == [2 * 2 * 2] * 2
    steps = [[index for one in passes for batch in one[start : start + 2] for index in batch] for start in (0, 2, 4, 6)]
    assert steps[0] == steps[1] and steps[2] == steps[3]
    assert sorted({*steps[0], *steps[2]}) == [0, 1, 2, 3, 4]
    one = FullSteps(5, EvenDivision(4, 4, 1, 0), seed=3, repeats=2)
    assert [sorted(batch) for batch in one] == [sorted(step) for step in steps]


def _spec(**fields: object) -> OnlineSpec:
    data = {"sources": [{"file": "x"}]}
    return OnlineSpec.model_validate({"data": data, "judge": {"stage": "reward"}, "rounds": 3, **fields})


def test_rounds_go_on_through_the_prompts() -> None:
    plan = schedule(_spec(promptsPerRound=4), rows=10, batch=2)
    assert (plan.steps, plan.total) == (2, 6)
    assert [plan.at(step) for step in (0, 1, 2, 5)] == [(0, 0), (0, 1), (1, 0), (2, 1)]
    rounds = [plan.prompts_of(number) for number in range(3)]
    assert [len(one) for one in rounds] == [4, 4, 4]
    assert len({*rounds[0], *rounds[1], *rounds[2][:2]}) == 10
    assert schedule(_spec(), rows=10, batch=4).steps == 3
    assert schedule(_spec(numTrainEpochs=2.0), rows=10, batch=4).steps == 5
    assert schedule(_spec(maxSteps=7), rows=10, batch=4).total == 9


def test_pairs_are_all_used_before_one_comes_again() -> None:
    plan = schedule(_spec(numTrainEpochs=3.0), rows=8, batch=4)
    drawn = [plan.pairs_of(1, step, count=5, batch=4) for step in range(plan.steps)]
    flat = [pair for step in drawn for pair in step]
    assert all(sorted(flat[start:end]) == [0, 1, 2, 3, 4] for start, end in pairwise((0, 5, 10, 15, 20)))
    assert drawn != [plan.pairs_of(2, step, count=5, batch=4) for step in range(plan.steps)]
