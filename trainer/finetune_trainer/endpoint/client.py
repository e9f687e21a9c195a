"""A client of an OpenAI-compatible server with rate limits and retries."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from finetune_api.endpoint import Endpoint
from finetune_api.problems import Problem
from finetune_api.redact import MARK, redact
from finetune_trainer.endpoint.chat import BadBody, ChatAnswer, ChatRequest, read_answer
from finetune_trainer.endpoint.rate_limit import RateLimit
from finetune_trainer.endpoint.request_body import Dialect
from finetune_trainer.errors import UserError
from finetune_trainer.heartbeat import record_progress

log = logging.getLogger(__name__)

FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0
"""Initial and maximum backoff in seconds; it doubles with each retry."""
OUTAGE_SECONDS = 600.0
"""Maximum time without any answer from the server before the run fails."""
MAX_BODY = 64 << 20
SHOWN = 300
_RATE_LIMITED = (429,)
_TRANSIENT = (408, 409, 425, *range(500, 600))
_FATAL = (401, 402, 403, 404, 405)
_NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")


class NoAnswer(Exception):
    """The server does not answer this request, but may answer others."""


class _Transient(Exception):
    """A failure after which the request is sent again; `counts` is whether it uses up one of `maxRetries`."""

    def __init__(self, message: str, wait: float | None = None, counts: bool = True) -> None:
        super().__init__(message)
        self.wait, self.counts = wait, counts


class ChatClient:
    """The client of one endpoint; an asynchronous context manager, for one event loop.

    Transient failures are retried: status 408, 409, 425, 429 and 5xx, timeouts, lost connections, bodies that are not
    chat completions. A server that supports `Idempotency-Key` charges a repeated request once.

    Args:
        where: the endpoint's path in the job, for messages.

    Raises:
        UserError: the variable of the API key is not set.
    """

    def __init__(self, endpoint: Endpoint, where: str, outage: float = OUTAGE_SECONDS) -> None:
        self.endpoint, self.where, self._outage = endpoint, where, outage
        self._key = _api_key(endpoint, where)
        self._dialect, self._rate_limit = Dialect(endpoint), RateLimit(endpoint)
        self._session: ClientSession | None = None
        self._last_answer = 0.0
        self.retries = 0
        """Number of retries so far."""

    async def __aenter__(self) -> Self:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._session = ClientSession(
            headers=headers,
            connector=TCPConnector(limit=self.endpoint.concurrency),
            timeout=ClientTimeout(total=self.endpoint.timeout_seconds),
            trust_env=True,
        )
        self._last_answer = _now()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """Return the answer to one request, with retries.

        Raises:
            NoAnswer: the server refuses this request, or `maxRetries` are used up.
            UserError: the server refuses every request: a wrong key, address or model, or an exhausted quota.
            ConnectionError: the server has not answered any request for ten minutes.
        """
        policy = _RetryPolicy(self.endpoint.max_retries)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            wait=policy.wait,
            stop=policy.stop,
            before_sleep=self._before_retry,
            reraise=True,
        )
        try:
            answer: ChatAnswer = await retrying(self._once, request)
        except _Transient as error:
            raise NoAnswer(f"no answer after {policy.failures} tries: {error}") from error
        return answer

    async def models(self, tries: int = 1) -> list[str]:
        """Return the names of the server's models; empty if it does not list them.

        Raises:
            UserError: the server can't be reached in `tries` requests, or refuses the key.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Transient),
            wait=wait_exponential_jitter(initial=FIRST_PAUSE, max=MAX_PAUSE, jitter=FIRST_PAUSE),
            stop=stop_after_attempt(tries),
            reraise=True,
        )
        try:
            names: list[str] = await retrying(self._models)
        except _Transient as error:
            message = f"{self._base} can't be reached: {error}"
            raise UserError([Problem(f"{self.where}.baseUrl", message)]) from error
        return names

    async def _models(self) -> list[str]:
        assert self._session is not None
        try:
            async with self._session.get(f"{self._base}/models", allow_redirects=False) as response:
                body = await _body(response)
                if response.status in (401, 402, 403):
                    raise self._fatal(response, body.decode("utf-8", "replace"))
        except (ClientError, OSError, TimeoutError, BadBody) as error:
            raise _Transient(_describe(error)) from error
        return _names(body) if response.status == 200 else []

    async def _once(self, request: ChatRequest) -> ChatAnswer:
        async with self._rate_limit.turn(request.prompt_tokens + request.generation.max_new_tokens):
            return await self._send(request)

    async def _send(self, request: ChatRequest) -> ChatAnswer:
        assert self._session is not None
        record_progress()  # a request has a timeout of its own
        sent = self._dialect.body(request)
        headers = {"Idempotency-Key": request.key(self.endpoint.model)}
        url = f"{self._base}/chat/completions"
        try:
            async with self._session.post(url, json=sent, headers=headers, allow_redirects=False) as response:
                body = await _body(response)
                if response.status != 200:
                    raise self._failure(response, body.decode("utf-8", "replace"), sent)
                answer = read_answer(body)
        except (ClientError, OSError, TimeoutError, BadBody) as error:
            raise _Transient(_describe(error)) from error
        self._last_answer = _now()
        record_progress()
        return answer

    def _failure(self, response: ClientResponse, text: str, sent: dict[str, Any]) -> Exception:
        status = response.status
        message = f"status {status}: {self._clean(text)}"
        if status in _RATE_LIMITED and not any(mark in text for mark in _NO_QUOTA):
            self._last_answer = _now()
            wait = retry_after(response.headers)
            if wait is not None:
                self._rate_limit.hold(wait)
            return _Transient(message, wait, counts=False)
        if status in _TRANSIENT:
            return _Transient(message, retry_after(response.headers))
        if status in _FATAL or status in _RATE_LIMITED or 300 <= status < 400:
            return self._fatal(response, text)
        self._last_answer = _now()
        if status in (400, 422) and self._dialect.learn(sent, text):
            return _Transient(message, wait=0.0, counts=False)
        return NoAnswer(f"the server refuses the request, {message}")

    def _fatal(self, response: ClientResponse, text: str) -> UserError:
        endpoint, status = self.endpoint, response.status
        field, why = "baseUrl", ""
        if status in (401, 403):
            field = "apiKeyEnv"
            why = " (no key was sent)" if self._key is None else f" (the key is that of {endpoint.api_key_env})"
        elif status == 404:
            field, why = "model", f" (asked for {endpoint.model!r} at {self._base})"
        elif 300 <= status < 400:
            why = f" (it redirects to {self._clean(response.headers.get('Location', 'nowhere'))})"
        message = f"the server refuses, status {status}: {self._clean(text)}{why}"
        return UserError([Problem(f"{self.where}.{field}", message)])

    def _before_retry(self, state: RetryCallState) -> None:
        self.retries += 1
        error = state.outcome.exception() if state.outcome else None
        log.debug("%s: %s; retrying", self.where, error)
        if _now() - self._last_answer > self._outage:
            minutes = f"{self._outage / 60:.0f} minutes"
            raise ConnectionError(f"{self.where}: {self._base} has not answered for {minutes}; last error: {error}")

    def _clean(self, text: str) -> str:
        """Return a server's message in one short line, without the API key, which some servers repeat."""
        known = text if not self._key else text.replace(self._key, MARK)
        return " ".join(redact(known).split())[:SHOWN] or "(no text)"

    @property
    def _base(self) -> str:
        return self.endpoint.base_url.rstrip("/")


class _RetryPolicy:
    """The backoff and the maximum number of retries of one request."""

    def __init__(self, max_retries: int) -> None:
        self.max_retries, self.failures = max_retries, 0
        self._pause = wait_exponential_jitter(initial=FIRST_PAUSE, max=MAX_PAUSE, jitter=FIRST_PAUSE)

    def stop(self, state: RetryCallState) -> bool:
        self.failures += _error(state).counts
        return self.failures > self.max_retries

    def wait(self, state: RetryCallState) -> float:
        retry_after = _error(state).wait
        return self._pause(state) if retry_after is None else retry_after


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait by a response's `Retry-After`, which has seconds or a date; None if there is none."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max((until - datetime.now(UTC)).total_seconds(), 0.0)


def _error(state: RetryCallState) -> _Transient:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, _Transient)
    return error


def _api_key(endpoint: Endpoint, where: str) -> str | None:
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        message = f"the environment variable {endpoint.api_key_env}, which must hold the API key, is not set"
        raise UserError([Problem(f"{where}.apiKeyEnv", message)])
    return key


async def _body(response: ClientResponse) -> bytes:
    """Return the whole body, up to a maximum size.

    Raises:
        BadBody: it is larger.
    """
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_BODY:
            raise BadBody(f"a body of more than {MAX_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


def _names(body: bytes) -> list[str]:
    try:
        listed = json.loads(body)["data"]
        return sorted(str(model["id"]) for model in listed)
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"


def _now() -> float:
    return asyncio.get_running_loop().time()
