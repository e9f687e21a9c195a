"""Several reporters as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finetune_trainer.progress.reporter import Progress, Reporter

_log = logging.getLogger(__name__)


class Reporters:
    """Tells each reporter in order. One that raises is logged the first time and told on: training never stops for
    the sake of its display."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)
        self._failed: set[int] = set()

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        self._tell(lambda reporter: reporter.stage_started(index, title, stages, message))

    def log(self, message: str) -> None:
        self._tell(lambda reporter: reporter.log(message))

    def waiting(self, message: str) -> None:
        self._tell(lambda reporter: reporter.waiting(message))

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        self._tell(lambda reporter: reporter.transport(network, gpu_direct, words, warning))

    def placing(self, message: str) -> None:
        self._tell(lambda reporter: reporter.placing(message))

    def restarting(self, message: str) -> None:
        self._tell(lambda reporter: reporter.restarting(message))

    def stalled(self, message: str, node: str | None) -> None:
        self._tell(lambda reporter: reporter.stalled(message, node))

    def progress(self, progress: Progress) -> None:
        self._tell(lambda reporter: reporter.progress(progress))

    def checkpoint_saved(self, index: int, step: int, place: str) -> None:
        self._tell(lambda reporter: reporter.checkpoint_saved(index, step, place))

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        self._tell(lambda reporter: reporter.stage_finished(index, title, result, metrics))

    def close(self) -> None:
        self._tell(lambda reporter: reporter.close())

    def _tell(self, call: Callable[[Reporter], None]) -> None:
        for index, reporter in enumerate(self._reporters):
            try:
                call(reporter)
            except Exception as error:
                self._complain(index, reporter, error)

    def _complain(self, index: int, reporter: Reporter, error: Exception) -> None:
        if index not in self._failed:
            self._failed.add(index)
            _log.warning("%s failed, further failures of it are not logged: %r", type(reporter).__name__, error)
