"""Combines several reporters into one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finetune_trainer.progress.reporter import Progress, Reporter

_log = logging.getLogger(__name__)


class Reporters:
    """Calls several reporters in order.

    An exception of a reporter is logged the first time and otherwise ignored: a display error must not stop training.
    """

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)
        self._failed: set[int] = set()

    def stage_started(self, index: int, title: str, stages: int, message: str) -> None:
        self._call(lambda reporter: reporter.stage_started(index, title, stages, message))

    def log(self, message: str) -> None:
        self._call(lambda reporter: reporter.log(message))

    def waiting(self, message: str) -> None:
        self._call(lambda reporter: reporter.waiting(message))

    def transport(self, network: str, gpu_direct: bool, words: str, warning: str) -> None:
        self._call(lambda reporter: reporter.transport(network, gpu_direct, words, warning))

    def placing(self, message: str) -> None:
        self._call(lambda reporter: reporter.placing(message))

    def restarting(self, message: str) -> None:
        self._call(lambda reporter: reporter.restarting(message))

    def stalled(self, message: str, node: str | None) -> None:
        self._call(lambda reporter: reporter.stalled(message, node))

    def progress(self, progress: Progress) -> None:
        self._call(lambda reporter: reporter.progress(progress))

    def checkpoint_saved(self, index: int, step: int, path: str) -> None:
        self._call(lambda reporter: reporter.checkpoint_saved(index, step, path))

    def stage_finished(self, index: int, title: str, result: str, metrics: dict[str, float]) -> None:
        self._call(lambda reporter: reporter.stage_finished(index, title, result, metrics))

    def close(self) -> None:
        self._call(lambda reporter: reporter.close())

    def _call(self, call: Callable[[Reporter], None]) -> None:
        for index, reporter in enumerate(self._reporters):
            try:
                call(reporter)
            except Exception as error:
                self._log_failure(index, reporter, error)

    def _log_failure(self, index: int, reporter: Reporter, error: Exception) -> None:
        if index not in self._failed:
            self._failed.add(index)
            _log.warning("%s failed, further failures of it are not logged: %r", type(reporter).__name__, error)
