from __future__ import annotations

import math

import pytest

from finetune_trainer.progress.formatting import (
    clean,
    count,
    duration,
    named_metrics,
    number,
    percent,
    size,
    step_parts,
)
from finetune_trainer.progress.reporter import Progress


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0 s"),
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (86400 * 2 + 3600 * 3, "2 d 03 h"),
        (-1, "0.0 s"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (950, "950"), (999.9, "1.0 k"), (12_345, "12.3 k"), (1_234_567, "1.2 M"), (0.5, "0.5"), (math.nan, "?")],
)
def test_count(value: float, shown: str) -> None:
    assert count(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(512, "512 B"), (1536, "1.5 KiB"), (80 * 2**30, "80 GiB"), (1023.9, "1.0 KiB")]
)
def test_size(value: float, shown: str) -> None:
    assert size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.34567, "2.346"),
        (3e-5, "3.0e-05"),
        (12.0, "12"),
        (1234567, "1234567"),
        (math.nan, "nan"),
        (0.61, "0.61"),
        (0, "0"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


def test_percent() -> None:
    assert percent(0.0351) == "3.5%"


def test_clean_shows_control_characters_and_keeps_lines() -> None:
    assert clean("a\x1b[2J\r\nb\tc\x00\x7f\x9b\ud800") == "a␛[2J\nb\tc␀␡\N{REPLACEMENT CHARACTER}?"


def test_metric_names_are_cleaned_too() -> None:
    assert named_metrics({"eval_loss": 1.5, "x\x1b": 2}) == "eval_loss 1.5 · x␛ 2"


def test_reinforcement_learning_shows_its_reward_before_its_loss() -> None:
    step = Progress(0, 1, "rlhf", 4, 40, loss=0.0, metrics={"reward": 1.0419, "kl": 0.0539, "completions/mean": 3.0})
    assert [text for _, text in step_parts(step)] == ["4/40", "reward 1.042", "kl 0.0539", "loss 0.0000"]
