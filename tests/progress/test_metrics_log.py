from __future__ import annotations

import math
from pathlib import Path

from finetune_trainer.progress.metrics_log import MetricsLog, read_metrics
from finetune_trainer.progress.reporter import Progress


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "stages" / "00-sft" / "metrics.jsonl"
    progress = Progress(0, 1, "sft", 1, 2, loss=2.5, metrics={"rewards/margins": 0.5})
    with MetricsLog(path) as log:
        log.append(progress.to_json())
        log.append({"step": 2, "loss": 2.25})
        assert [row["step"] for row in read_metrics(path.read_text())] == [1, 2]
    assert read_metrics(path.read_text())[0] == progress.to_json()


def test_a_torn_last_line_is_ignored_and_closed_off_by_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert read_metrics(path.read_text()) == [{"step": 1, "loss": 3.0}]
    with MetricsLog(path) as log:
        log.append({"step": 2, "loss": 2.0})
    assert read_metrics(path.read_text()) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_repeated_steps_appear_once_with_the_later_values() -> None:
    text = '{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 3, "loss": 9}\n{"step": 2, "loss": 2}\n'
    assert read_metrics(text) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": 9}]


def test_an_evaluation_line_joins_the_training_line_of_its_step() -> None:
    text = (
        '{"step": 5, "loss": 3, "metrics": {"rewards/margins": 1}}\n{"step": 5, "metrics": {"eval_loss": 2}}\n'
        '{"step": 6, "loss": 1}\n'
    )
    assert read_metrics(text) == [
        {"step": 5, "loss": 3, "metrics": {"rewards/margins": 1, "eval_loss": 2}},
        {"step": 6, "loss": 1},
    ]


def test_what_is_no_row_is_left_out() -> None:
    text = (
        '\n[]\nnull\n"x"\n{"loss": 1}\n{"step": true}\n{"step": "3"}\n{"step": 4, "metrics": []}\n\x00\x00\n{"step": 1}'
    )
    assert read_metrics(text) == [{"step": 1}]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": math.nan, "metrics": {"x": -math.inf}})
    assert '"NaN"' in path.read_text()
    row = read_metrics(path.read_text())[0]
    assert math.isnan(row["loss"]) and row["metrics"] == {"x": -math.inf}
