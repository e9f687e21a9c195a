"""Limit requests: their concurrency, their rate per minute, and pauses that the server requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

from finetune_api.endpoint import Endpoint

MINUTE = 60.0


class RateLimit:
    """The limits of one endpoint, shared by all requests of one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        per_minute, self._max_tokens = endpoint.requests_per_minute, endpoint.tokens_per_minute
        # One at a time and evenly spaced: servers refuse a minute's quota in one burst.
        self._requests = AsyncLimiter(1, MINUTE / per_minute) if per_minute else None
        self._tokens = AsyncLimiter(self._max_tokens, MINUTE) if self._max_tokens else None
        self._not_before = 0.0

    @asynccontextmanager
    async def turn(self, tokens: int) -> AsyncIterator[None]:
        """Wait until a request of about `tokens` tokens may be sent; occupy one of the concurrent slots."""
        async with self._slots:
            if self._tokens is not None and self._max_tokens is not None:
                await self._tokens.acquire(min(tokens, self._max_tokens))
            if self._requests is not None:
                await self._requests.acquire()
            while (wait := self._not_before - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait)
            yield

    def hold(self, seconds: float) -> None:
        """Delay all requests by at least `seconds`: a server's `Retry-After` applies to every request."""
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + seconds)
