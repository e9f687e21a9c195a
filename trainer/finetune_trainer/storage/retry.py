"""Patience with a store that is away for a while: what may pass is tried again, what can't is told at once."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from finetune_trainer.heartbeat import record_progress

log = logging.getLogger(__name__)
FIRST_SECONDS, MOST_SECONDS = 0.5, 10.0
"""The first pause between two tries, and the longest; each is twice the one before."""
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
T = TypeVar("T")


class _Waits:
    """Who waits for a store in this process, from whatever threads, and who is told of it."""

    def __init__(self) -> None:
        self.told: Callable[[str], None] = lambda _: None
        self._words: dict[object, str] = {}
        self._last = ""
        self._lock = threading.Lock()

    def begins(self, who: object, words: str) -> None:
        """Doing it again changes nothing."""
        with self._lock:
            self._words.setdefault(who, words)
            self._tell()

    def ends(self, who: object) -> None:
        with self._lock:
            self._words.pop(who, None)
            self._tell()

    def _tell(self) -> None:
        words = next(iter(self._words.values()), "")
        if words != self._last:
            self._last = words
            self.told(words)


_waits = _Waits()


def on_waiting(told: Callable[[str], None]) -> None:
    """From now on this process tells `told`, and nobody else, what has to wait for a store: of several the one that has
    waited longest, and an empty text when none has to any more. From whatever thread that happens in."""
    _waits.told = told


def call_with_retries(work: Callable[[], T], what: str, seconds: float) -> T:
    """Do work that may be done twice; try again for up to `seconds` while the store doesn't answer.

    Args:
        what: is logged with each failure.

    Raises:
        OSError: the store refuses, or was away for longer than that.
    """
    pause, deadline, who = FIRST_SECONDS, time.monotonic() + seconds, object()
    try:
        while True:
            try:
                return work()
            except Exception as error:
                if not is_transient(error):
                    raise
                if time.monotonic() + pause > deadline:
                    raise _as_os_error(error, what) from error
                log.warning("%s: %s: %s; tried again in %.1f s", what, type(error).__name__, error, pause)
                _waits.begins(who, f"{what}: {type(error).__name__}: {error}")
            record_progress()  # an outage has a limit of its own
            time.sleep(pause)
            pause = min(2 * pause, MOST_SECONDS)
    finally:
        _waits.ends(who)


def is_transient(error: BaseException) -> bool:
    """Whether a store's error says nothing about the store as it will be in a while."""
    if isinstance(error, _LASTING):
        return False
    return isinstance(error, (OSError, *_of_libraries())) or _passes_in_gcs(error)


def _of_libraries() -> tuple[type[BaseException], ...]:
    """Errors of connections that are no OSError, of the libraries that fsspec's stores are made of."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as S3ConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    return (ClientError, S3ConnectionError, HTTPClientError, ResponseParserError)


def _passes_in_gcs(error: BaseException) -> bool:
    """gcsfs tells by an error's code; where it isn't imported, the error is not its own."""
    retry = sys.modules.get("gcsfs.retry")
    return retry is not None and bool(retry.is_retriable(error))


def _as_os_error(error: Exception, what: str) -> OSError:
    return error if isinstance(error, OSError) else ConnectionError(f"{what}: {type(error).__name__}: {error}")
