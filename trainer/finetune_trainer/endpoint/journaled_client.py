"""A client that reads answers from the journal if possible, and else from the server."""

from __future__ import annotations

import asyncio

from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.endpoint.client import ChatClient
from finetune_trainer.endpoint.journal import Journal


class JournaledClient:
    """A client that writes each answer to a journal before it returns it."""

    def __init__(self, client: ChatClient, journal: Journal) -> None:
        self._client, self._journal = client, journal
        self._pending: dict[str, asyncio.Task[ChatAnswer]] = {}

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """Return the answer to a request; concurrent equal requests are sent once.

        Raises:
            NoAnswer: see `ChatClient.complete`.
            UserError: see `ChatClient.complete`.
            ConnectionError: see `ChatClient.complete`.
        """
        key = request.key(self._client.endpoint.model)
        known = self._journal.answers.get(key)
        if known is not None:
            return known
        task = self._pending.get(key)
        if task is None:
            task = self._pending[key] = asyncio.create_task(self._send(key, request))
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(task)

    async def settle(self, seconds: float) -> None:
        """Wait up to `seconds` for pending requests, which may already be paid for, and then cancel them."""
        tasks = list(self._pending.values())
        if not tasks:
            return
        _, unfinished = await asyncio.wait(tasks, timeout=seconds)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, key: str, request: ChatRequest) -> ChatAnswer:
        answer = await self._client.complete(request)
        self._journal.record(key, answer)
        await self._journal.synced()
        return answer
