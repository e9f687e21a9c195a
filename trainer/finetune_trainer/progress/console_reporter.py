"""Shows progress on a terminal: a live line for the running stage, with finished stages and log lines above it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from finetune_trainer.progress.formatting import clean, duration, evaluation_of, named_metrics, step_parts
from finetune_trainer.progress.plain_reporter import PlainReporter
from finetune_trainer.progress.reporter import LineReporter, Progress, Reporter

BAR_MIN, BAR_MAX = 10, 32
REFRESH_PER_SECOND = 4


def reporter_for(stream: TextIO) -> Reporter:
    """Return the reporter for a stream: a live display on a capable terminal, plain lines otherwise."""
    console = Console(file=stream, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    return ConsoleReporter(console) if live else PlainReporter(stream)


class ConsoleReporter(LineReporter):
    """Shows one live line: name, bar, step/total, loss, learning rate, gradient norm, tokens/s, MFU, ETA.

    On a narrow terminal the least important parts are omitted. Other output appears above the line.

    Args:
        console: the terminal.
        clock: returns the seconds of a monotonic clock.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started = clock()
        self._line: StageLine | None = None
        self._live: Live | None = None

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        self._started = self._clock()
        self._line = StageLine(f"{index + 1}/{stages} {clean(title)}", clean(message) or "starting")
        if self._live is None:
            self._live = Live(console=self._console, get_renderable=self._renderable, transient=True,
                              refresh_per_second=REFRESH_PER_SECOND)  # fmt: skip
            self._live.start()

    def log(self, message: str) -> None:
        self._console.print(Text(clean(message)))

    def progress(self, progress: Progress) -> None:
        if self._line is not None:
            self._line.progress = progress
        evaluation = evaluation_of(progress)
        if evaluation:
            self.log(f"{progress.title} step {progress.step}: {named_metrics(evaluation)}")

    def checkpoint_saved(self, index: int, step: int, path: str) -> None:
        """Do nothing: the end of a run names its last checkpoint."""

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        self._console.print(self._summary(title, result, metrics))
        self._line = None

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _renderable(self) -> StageLine | Text:
        return self._line or Text()

    def _summary(self, title: str, result: str, metrics: dict[str, float]) -> Text:
        loss = self._line.progress.loss if self._line and self._line.progress else None
        shown = metrics if loss is None or "loss" in metrics else {"loss": loss, **metrics}
        parts = [duration(self._clock() - self._started), named_metrics(shown)]
        return Text.assemble(
            ("✓ ", "bold green"),
            (clean(title), "bold"),
            "  ",
            " · ".join(filter(None, parts)),
            (f"  {clean(result)}", "dim"),
        )


class StageLine:
    """The live line of one stage: a spinner with a message until the first step, then a progress bar."""

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        self.progress: Progress | None = None
        self._spinner = Spinner(
            "dots", Text.assemble((name, "bold"), f"  {message}", no_wrap=True, overflow="ellipsis")
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._spinner if self.progress is None else _bar_line(self.name, self.progress, options.max_width)


def _bar_line(name: str, progress: Progress, width: int) -> Table:
    stats = fit(list(step_parts(progress)), width - len(name) - BAR_MIN - 4)
    room = width - len(name) - len(stats) - 4
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(3):
        grid.add_column(no_wrap=True, overflow="ellipsis")
    bar = ProgressBar(max(progress.total, 1), progress.step, width=min(max(room, 1), BAR_MAX))
    grid.add_row(Text(name, "bold"), bar, Text(stats))
    return grid


def fit(parts: list[tuple[int, str]], width: int) -> str:
    """Join the texts of `parts` (rank, text), and omit those of the highest rank until at most `width` cells are used.

    The part of the lowest rank is never omitted.
    """
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)
