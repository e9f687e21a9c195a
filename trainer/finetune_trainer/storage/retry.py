"""Retries of storage operations during an outage: transient errors are retried, all others are raised at once."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_exponential

from finetune_trainer.heartbeat import record_progress

log = logging.getLogger(__name__)
FIRST_SECONDS, MOST_SECONDS = 0.5, 10.0
"""The first and the longest pause between two attempts; each pause is twice the previous one."""
_PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
T = TypeVar("T")


class _Waits:
    """The operations of this process, on any thread, that wait for storage.

    Only the longest wait is reported: several threads usually wait for the same outage.
    """

    def __init__(self) -> None:
        self.report: Callable[[str], None] = lambda _: None
        self._messages: dict[object, str] = {}
        self._reported = ""
        self._lock = threading.Lock()

    def add(self, operation: object, message: str) -> None:
        """Add a wait; a second call for the same operation changes nothing."""
        with self._lock:
            self._messages.setdefault(operation, message)
            self._report_change()

    def remove(self, operation: object) -> None:
        with self._lock:
            self._messages.pop(operation, None)
            self._report_change()

    def _report_change(self) -> None:
        message = next(iter(self._messages.values()), "")
        if message != self._reported:
            self._reported = message
            self.report(message)


_waits = _Waits()


def on_waiting(report: Callable[[str], None]) -> None:
    """Report waits for storage in this process to `report` from now on, in place of any earlier receiver.

    Args:
        report: receives the message of the longest wait, and an empty text once no operation waits. It may be called
            from any thread.
    """
    _waits.report = report


def call_with_retries(work: Callable[[], T], description: str, seconds: float) -> T:
    """Call `work`, which must be idempotent, and retry it for up to `seconds` while storage does not respond.

    Args:
        work: the operation.
        description: of the operation; logged with each failure.
        seconds: timeout of an outage.

    Raises:
        OSError: storage has refused the operation, or the outage was longer than the timeout.
    """
    operation = object()

    def before_sleep(state: RetryCallState) -> None:
        error, pause = (state.outcome.exception() if state.outcome else None), state.upcoming_sleep
        message = f"{description}: {type(error).__name__}: {error}"
        log.warning("%s; retried in %.1f s", message, pause)
        _waits.add(operation, message)
        record_progress()  # an outage has its own timeout, so it is not a stall

    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential(multiplier=FIRST_SECONDS, max=MOST_SECONDS),
        stop=stop_before_delay(seconds),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(work)
    except Exception as error:
        if isinstance(error, OSError) or not is_transient(error):
            raise
        raise ConnectionError(f"{description}: {type(error).__name__}: {error}") from error
    finally:
        _waits.remove(operation)


def is_transient(error: BaseException) -> bool:
    """Whether an error of a storage may pass, such as a lost connection, so that a retry may succeed."""
    if isinstance(error, _PERMANENT):
        return False
    return isinstance(error, (OSError, *_library_errors())) or _is_retriable_in_gcs(error)


def _library_errors() -> tuple[type[BaseException], ...]:
    """Return connection errors that are not OSErrors, of the libraries behind fsspec's file systems."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as S3ConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError

    return (ClientError, S3ConnectionError, HTTPClientError, ResponseParserError)


def _is_retriable_in_gcs(error: BaseException) -> bool:
    """Whether gcsfs counts an error as retriable, by its code. If gcsfs is not imported, the error is not its own."""
    retry = sys.modules.get("gcsfs.retry")
    return retry is not None and bool(retry.is_retriable(error))
