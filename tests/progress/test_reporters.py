from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console

from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.progress.console_reporter import ConsoleReporter, StageLine, fit, reporter_for
from finetune_trainer.progress.multi_reporter import Reporters
from finetune_trainer.progress.plain_reporter import PlainReporter
from finetune_trainer.progress.reporter import Progress, Reporter


class Clock:
    """A clock that changes only when a test sets it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, total: int = 100, **values: object) -> Progress:
    return Progress(1, 4, "sft", number, total, loss=2.5, learning_rate=3e-4, grad_norm=1.25, **values)  # type: ignore[arg-type]


def full(number: int, total: int = 100) -> Progress:
    return step(number, total, tokens_per_second=12345.0, mfu=0.41, eta=200.0)


def test_plain_lines_are_few_and_hold_the_values() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = PlainReporter(stream, clock)
    reporter.stage_started(1, "sft", 4, "resumed at step 40")
    for number in range(1, 1001):
        clock.now += 0.01
        reporter.progress(full(number, 1000))
    reporter.stage_finished(1, "sft", "runs/x/stages/01-sft/result", {"eval_loss": 1.5})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[2/4 sft]: resumed at step 40"
    assert lines[1] == (
        "[2/4 sft] 1/1000 · loss 2.5000 · lr 3.00e-04 · grad 1.25 · 12.3 k tok/s · MFU 41.0% · ETA 3 min 20 s"
    )
    assert lines[-2].startswith("[2/4 sft] 1000/1000")
    assert lines[-1] == "sft: done in 10 s · eval_loss 1.5 · runs/x/stages/01-sft/result"
    assert 10 <= len(lines) <= 14


def test_plain_lines_come_by_time_in_a_long_stage() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = PlainReporter(stream, clock)
    reporter.stage_started(0, "sft", 1, "")
    for number in range(1, 31):
        clock.now += 1.0
        reporter.progress(step(number, 1_000_000))
    assert re.findall(r"\] (\d+)/1000000", stream.getvalue()) == ["1", "11", "21"]


def test_plain_shows_every_evaluation_and_the_last_step_once() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, Clock())
    for progress in (step(1), step(2, metrics={"eval_loss": 3.0, "x": 1.0}), step(3), step(100), step(100)):
        reporter.progress(progress)
    assert re.findall(r"\] (\d+)/100 ", stream.getvalue()) == ["1", "2", "100"]
    assert "eval_loss 3" in stream.getvalue() and " x 1" not in stream.getvalue()


def test_plain_has_no_control_characters_and_fits_the_encoding() -> None:
    raw = io.BytesIO()
    reporter = PlainReporter(io.TextIOWrapper(raw, encoding="ascii"), Clock())
    reporter.log("loading \x1b[31mmodel\x1b[0m ✓\r")
    text = raw.getvalue().decode("ascii")
    assert text == "loading ?[31mmodel?[0m ??\n"


def console_of(stream: io.StringIO, width: int = 120) -> Console:
    return Console(file=stream, force_terminal=True, width=width, height=30, color_system=None, _environ={})


def drawn(progress: Progress, width: int) -> str:
    stream = io.StringIO()
    line = StageLine("2/4 sft", "starting")
    line.progress = progress
    console_of(stream, width).print(line)
    return stream.getvalue()


def test_the_live_line_shows_all_on_a_wide_terminal() -> None:
    text = drawn(full(42), 120)
    for part in (
        "2/4 sft",
        "━",
        "42/100",
        "loss 2.5000",
        "lr 3.00e-04",
        "grad 1.25",
        "12.3 k tok/s",
        "MFU 41.0%",
        "ETA 3 min 20 s",
    ):
        assert part in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 140])
def test_the_live_line_is_one_line_at_any_width(width: int) -> None:
    lines = drawn(full(42), width).splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= width


def test_the_least_important_parts_go_first() -> None:
    assert fit([(0, "1/2"), (5, "grad 1"), (1, "loss 2")], 12) == "1/2  loss 2"
    assert fit([(0, "1000/2000"), (1, "loss 2")], 3) == "1000/2000"


def test_console_keeps_finished_stages_and_log_lines() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = ConsoleReporter(console_of(stream), clock)
    reporter.stage_started(0, "pretrain", 2, "from scratch")
    reporter.log("tokenised [red]1,000[/red] rows \x1b]0;title\x07")
    reporter.progress(full(1))
    reporter.progress(step(50, metrics={"eval_loss": 3.0}))
    clock.now = 61.0
    reporter.stage_finished(0, "pretrain", "runs/a/result", {"eval_loss": 1.25})
    reporter.stage_started(1, "sft", 2, "from pretrain")
    reporter.close()
    reporter.close()
    text = stream.getvalue()
    assert "tokenised [red]1,000[/red] rows ␛]0;title␇" in text
    assert "sft step 50: eval_loss 3" in text
    assert "✓ pretrain  1 min 01 s · loss 2.5 · eval_loss 1.25  runs/a/result" in text
    assert "from pretrain" in text


def test_console_survives_calls_out_of_order() -> None:
    reporter = ConsoleReporter(console_of(io.StringIO()), Clock())
    reporter.progress(step(1))
    reporter.stage_finished(0, "sft", "r", {})
    reporter.close()
    reporter.log("after the end")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "term", "expected"),
    [
        (Terminal(), "xterm", ConsoleReporter),
        (Terminal(), "dumb", PlainReporter),
        (io.StringIO(), "xterm", PlainReporter),
    ],
)
def test_the_stream_decides(
    stream: io.StringIO, term: str, expected: type[Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", term)
    assert type(reporter_for(stream)) is expected


class Broken(PlainReporter):
    """A log that raises at every line."""

    def log(self, message: str) -> None:
        raise BrokenPipeError("gone")


def test_one_that_raises_does_not_stop_the_others_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    reporters = Reporters([Broken(io.StringIO()), PlainReporter(stream)])
    with caplog.at_level(logging.WARNING):
        reporters.stage_started(0, "sft", 1, "")
        reporters.log("one")
        reporters.log("two")
        reporters.progress(step(1))
        reporters.stage_finished(0, "sft", "r", {})
        reporters.close()
    assert "one\ntwo\n" in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 5
    assert [record.message.split(" failed")[0] for record in caplog.records] == ["Broken"]


def test_what_an_attempt_waits_for_is_in_its_report_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nowhere-to-be-seen")
    reporter = AttemptReporter(["sft"])
    reporter.waiting("writing run.json: OSError: nowhere-to-be-seen is away")
    waiting = reporter.report().waiting
    assert waiting is not None and waiting.startswith("writing run.json: ") and "nowhere-to-be-seen" not in waiting
    reporter.waiting("")
    assert reporter.report().waiting is None


def test_why_workers_start_again_is_in_the_report_until_they_train() -> None:
    reporter = AttemptReporter(["sft"])
    reporter.restarting("error: OSError: [Errno 28] No space left on device")
    reporter.stage_started(0, "sft", 1, "2 workers")  # the workers run and may fail from here on
    assert reporter.report().restarting == "error: OSError: [Errno 28] No space left on device"
    reporter.progress(step(1))
    assert reporter.report().restarting is None
    reporter.restarting("lost: a node is gone")
    reporter.stage_finished(0, "sft", "r", {})
    assert reporter.report().restarting is None


def test_a_wait_for_storage_is_a_line() -> None:
    screen = io.StringIO()
    reporter = PlainReporter(screen)
    reporter.waiting("writing run.json: OSError: away")
    reporter.waiting("")
    assert screen.getvalue().splitlines() == [
        "waiting for storage: writing run.json: OSError: away",
        "storage responds again",
    ]
