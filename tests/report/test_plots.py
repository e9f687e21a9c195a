from __future__ import annotations

import numpy as np
import pytest

from finetune_trainer.report.plots import DRAWN_MAX, Panel, smoothed, thinned, to_svg


def test_thinning_keeps_every_extreme() -> None:
    values = np.sin(np.arange(50_000) / 7.0)
    values[31_234] = 99.0
    steps, kept = thinned(np.arange(50_000), values)
    assert len(kept) <= DRAWN_MAX
    assert kept.max() == 99.0 and kept.min() == values.min()
    assert (np.diff(steps) > 0).all()


def test_a_short_curve_is_not_thinned() -> None:
    steps, values = np.arange(5), np.arange(5.0)
    assert thinned(steps, values)[1] is values


@pytest.mark.parametrize("length", [1, 2, 49, 201, 5000])
def test_smoothing_keeps_the_length_and_a_constant(length: int) -> None:
    assert np.allclose(smoothed(np.full(length, 2.5)), 2.5)


def test_smoothing_takes_noise_away() -> None:
    noise = np.random.default_rng(0).normal(size=5000)
    assert smoothed(noise).std() < 0.15 * noise.std()


def test_a_picture_is_small_deterministic_and_follows_the_page() -> None:
    points = [(step, 1.0 + step % 7) for step in range(100_000)]
    svg = to_svg(Panel("Loss", {"train": points, "held-out": points[::100]}), "salt")
    assert svg == to_svg(Panel("Loss", {"train": points, "held-out": points[::100]}), "salt")
    assert len(svg) < 300_000
    assert "var(--line-1)" in svg and "var(--line-2)" in svg and "currentColor" in svg
    assert "#0" not in svg.replace('"#', "").replace("(#", "") and "http" not in svg
    assert ">held-out</text>" in svg


def test_two_salts_share_no_ids() -> None:
    panel = Panel("Loss", {"train": [(1, 1.0), (2, 2.0)]})
    assert not set(_ids(to_svg(panel, "a"))) & set(_ids(to_svg(panel, "b")))


def test_titles_are_escaped() -> None:
    assert 'aria-label="&quot;&lt;b&gt;"' in to_svg(Panel('"<b>', {"train": [(1, 1.0)]}), "s")


@pytest.mark.parametrize(("values", "is_log"), [((1.0, 500.0), True), ((1.0, 50.0), False), ((0.0, 500.0), False)])
def test_the_axis_is_logarithmic_where_it_helps(values: tuple[float, float], is_log: bool) -> None:
    points = list(enumerate(values))
    free, fixed = (to_svg(Panel("x", {"x": points}, may_be_log=may), "s") for may in (True, False))
    assert (free != fixed) is is_log


def test_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="panel 'Loss' has no points"):
        to_svg(Panel("Loss", {"train": []}), "s")


def _ids(svg: str) -> list[str]:
    return [part.split('"')[0] for part in svg.split('id="')[1:]]
