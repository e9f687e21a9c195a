from __future__ import annotations

import json

import pytest

from finetune_trainer.progress.throughput import Meter, Rates


def test_nothing_is_known_before_two_marks() -> None:
    meter = Meter()
    assert meter.update(5.0, 1, 100, 4) == Rates(seconds=0.0)
    assert meter.update(5.0, 1, 100, 4).eta(10) is None


@pytest.mark.parametrize(
    ("updates", "tokens_per_second", "samples_per_second", "eta_of_10"),
    [
        # (now, step, tokens, samples)
        ([(1.0, 1, 100, 2)], 100.0, 2.0, 10.0),
        ([(9.0, 1, 100, 2), (10.0, 2, 200, 4)], 100.0, 2.0, 10.0),  # the slow first step is excluded
        ([(9.0, 1, 100, 2), (10.0, 2, 200, 4), (12.0, 3, 600, 6)], 500 / 3, 4 / 3, 15.0),
        ([(5.0, 10, 1000, 20), (6.0, 20, 2000, 40), (7.0, 30, 3000, 60)], 1000.0, 20.0, 1.0),  # logged every 10 steps
    ],
)
def test_rates(
    updates: list[tuple[float, int, int, int]], tokens_per_second: float, samples_per_second: float, eta_of_10: float
) -> None:
    meter = Meter()
    meter.start(0.0)
    for update in updates:
        rates = meter.update(*update)
    assert rates.tokens_per_second == pytest.approx(tokens_per_second)
    assert rates.samples_per_second == pytest.approx(samples_per_second)
    assert rates.eta(10) == pytest.approx(eta_of_10)
    assert rates.seconds == updates[-1][0]


def test_the_window_slides() -> None:
    meter = Meter(window=3)
    meter.start(0.0)
    for step in range(1, 11):
        meter.update(float(step), step, step * 10, step)
    for step in range(11, 14):
        rates = meter.update(10.0 + (step - 10) * 2.0, step, step * 10, step)
    assert rates.tokens_per_second == pytest.approx(5.0)


def test_pauses_count_neither_as_time_nor_in_rates() -> None:
    meter = Meter()
    meter.start(100.0)
    meter.update(101.0, 1, 10, 1)
    meter.update(102.0, 2, 20, 2)
    meter.pause(102.0)
    meter.pause(150.0)
    meter.resume(202.0)
    meter.resume(203.0)
    rates = meter.update(203.0, 3, 30, 3)
    assert rates == Rates(seconds=3.0, tokens_per_second=10.0, samples_per_second=1.0, seconds_per_step=1.0)


def test_seconds_go_on_after_a_restart_and_rates_begin_anew() -> None:
    meter = Meter()
    meter.start(0.0)
    meter.update(40.0, 4, 400, 4)
    state = json.loads(json.dumps(meter.to_state(41.0)))
    resumed = Meter.from_state(state)
    resumed.start(5000.0, step=4, tokens=400, samples=4)
    rates = resumed.update(5002.0, 5, 500, 5)
    assert rates.seconds == pytest.approx(43.0)
    assert rates.tokens_per_second == pytest.approx(50.0)


def test_an_empty_state_is_a_new_run() -> None:
    assert Meter.from_state({}).seconds(9.0) == 0.0


def test_no_eta_below_zero() -> None:
    assert Rates(1.0, seconds_per_step=2.0).eta(-3) == 0.0


def test_a_clock_that_stands_still_gives_no_rate() -> None:
    meter = Meter()
    meter.start(1.0)
    assert meter.update(1.0, 1, 10, 1).tokens_per_second is None
