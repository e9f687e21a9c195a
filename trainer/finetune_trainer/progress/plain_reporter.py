"""Reports progress as plain lines, for pipes, log files and CI."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from finetune_trainer.progress.formatting import clean, duration, evaluation_of, named_metrics, step_parts
from finetune_trainer.progress.reporter import LineReporter, Progress

INTERVAL_SECONDS = 10.0
INTERVAL_FRACTION = 0.1


class PlainReporter(LineReporter):
    """Writes lines without control characters at a limited rate.

    It writes the first step, then one step every 10 s or every tenth of the stage, every evaluation and the last step.

    Args:
        stream: the output.
        clock: returns the seconds of a monotonic clock.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._started = clock()
        self._shown: tuple[float, int] | None = None

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        self._started, self._shown = self._clock(), None
        self._write(_named(index, stages, title) + (f": {message}" if message else ": started"))

    def log(self, message: str) -> None:
        self._write(message)

    def progress(self, progress: Progress) -> None:
        now = self._clock()
        if self._is_due(progress, now):
            self._shown = (now, progress.step)
            self._write(f"{_named(progress.stage, progress.stages, progress.title)} {_line(progress)}")

    def checkpoint_saved(self, index: int, step: int, path: str) -> None:
        """Do nothing: the end of a run names its last checkpoint."""

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        took = duration(self._clock() - self._started)
        parts = [f"{title}: done in {took}", *([named_metrics(metrics)] if metrics else []), result]
        self._write(" · ".join(filter(None, parts)))

    def close(self) -> None:
        self._stream.flush()

    def _is_due(self, progress: Progress, now: float) -> bool:
        if self._shown is None or evaluation_of(progress):
            return True
        then, step = self._shown
        if progress.step >= progress.total:
            return progress.step != step
        return now - then >= INTERVAL_SECONDS or progress.step - step >= INTERVAL_FRACTION * progress.total

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(clean(text).encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


def _named(index: int, stages: int, title: str) -> str:
    return f"[{index + 1}/{stages} {title}]"


def _line(progress: Progress) -> str:
    parts = [part for _, part in step_parts(progress)]
    evaluation = evaluation_of(progress)
    return " · ".join([*parts, *([named_metrics(evaluation)] if evaluation else [])])
