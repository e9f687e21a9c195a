"""When a request may go: so many at once, so many a minute, and not before the server wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

from finetune_api.endpoint import Endpoint

MINUTE = 60.0


class Pace:
    """The limits of one endpoint, for all requests of one event loop together."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        per_minute, self._most_tokens = endpoint.requests_per_minute, endpoint.tokens_per_minute
        # One at a time and evenly spread: a minute's worth at once is what servers refuse.
        self._requests = AsyncLimiter(1, MINUTE / per_minute) if per_minute else None
        self._tokens = AsyncLimiter(self._most_tokens, MINUTE) if self._most_tokens else None
        self._not_before = 0.0

    @asynccontextmanager
    async def turn(self, tokens: int) -> AsyncIterator[None]:
        """Wait for one's turn to send a request of about so many tokens, and hold it."""
        async with self._slots:
            if self._tokens is not None and self._most_tokens is not None:
                await self._tokens.acquire(min(tokens, self._most_tokens))
            if self._requests is not None:
                await self._requests.acquire()
            while (wait := self._not_before - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait)
            yield

    def hold(self, seconds: float) -> None:
        """No request goes before so many seconds from now: what a server asks of one it asks of all."""
        self._not_before = max(self._not_before, asyncio.get_running_loop().time() + seconds)
