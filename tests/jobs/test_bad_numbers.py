"""Which losses and gradient norms count as bad, tested on sequences of numbers without a model."""

from __future__ import annotations

import json
import math
import random

import pytest

from finetune_trainer.training.bad_numbers import LEAST, WINDOW, Finding, LossMonitor


def judged(losses: list[float], norms: list[float] | None = None, **fields: object) -> list[Finding | None]:
    judge = LossMonitor(**{"watch_level": True, "clip": 1.0, "warmup": 0} | fields)  # type: ignore[arg-type]
    return [judge.check(step, loss, norms[step] if norms else 0.5) for step, loss in enumerate(losses)]


def curve(seed: int, steps: int = 2000, batch_noise: float = 0.2) -> list[float]:
    """Return a loss curve from 10 to 2 with batch noise and the heavy upper tail of small batches."""
    chance = random.Random(seed)
    return [
        2 + 8 * math.exp(-step / 60) + batch_noise * (chance.gauss(0, 1) + chance.expovariate(1))
        for step in range(steps)
    ]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_bad_from_the_first_step_on(number: float) -> None:
    for found in (judged([number])[0], judged([2.0], [abs(number)])[0], judged([number], warmup=9)[0]):
        assert found is not None and not found.finite


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.02, 0.2, 0.5])
def test_ten_undisturbed_curves_raise_no_alarm(seed: int, noise: float) -> None:
    chance = random.Random(seed + 100)
    norms = [abs(chance.lognormvariate(0, 0.7)) for _ in range(2000)]
    assert not any(judged(curve(seed, batch_noise=noise), norms))


def test_a_spike_is_found_and_does_not_move_the_median() -> None:
    losses = curve(0, 400)
    for step in (300, 301, 302):
        losses[step] = 9.0
    found = judged(losses)
    assert [step for step, one in enumerate(found) if one] == [300, 301, 302]
    assert found[300] is not None and found[300].finite
    assert "the loss is 9" in found[300].text and "robust standard deviations" in found[300].text


def test_a_flat_loss_may_rise_by_less_than_a_nat() -> None:
    assert not any(judged([0.01] * 50 + [0.9]))
    found = judged([0.01] * 50 + [1.2])
    assert found[-1] is not None and "standard deviations" not in found[-1].text


def test_nothing_finite_is_bad_before_there_are_steps_to_compare_with_or_while_the_rate_warms_up() -> None:
    assert not any(judged([2.0] * (LEAST - 1) + [50.0]))
    assert judged([2.0] * LEAST + [50.0])[-1]
    assert not any(judged([2.0] * 60 + [50.0], warmup=61))


def test_the_loss_of_other_stages_is_no_level() -> None:
    assert not any(judged([0.001] * 50 + [4.0], watch_level=False))


def test_exploding_gradients() -> None:
    norms = [1.0, 3.0, 2.0] * 20
    assert not any(judged([2.0] * 61, [*norms, 29.0]))
    found = judged([2.0] * 61, [*norms, 31.0])[-1]
    assert found is not None and found.finite and "10.3 times the largest" in found.text
    assert not any(judged([2.0] * 61, [one / 100 for one in norms] + [0.9])), "it is not even clipped"
    assert not any(judged([2.0] * 61, [0.0] * 60 + [5.0])), "rewards that do not differ give no gradient at all"


def test_a_resumed_run_judges_as_an_undisturbed_one() -> None:
    judge = LossMonitor(True, 1.0, 0)
    for step, loss in enumerate(curve(1, WINDOW + 9)):
        judge.check(step, loss, 0.5)
    resumed = LossMonitor(True, 1.0, 0)
    resumed.restore(json.loads(json.dumps(judge.to_state())))
    assert resumed == judge and resumed.losses.maxlen == WINDOW
