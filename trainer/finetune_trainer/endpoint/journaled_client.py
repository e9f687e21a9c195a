"""Answers, each paid for once: from the journal, else from the server."""

from __future__ import annotations

import asyncio

from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.endpoint.client import ChatClient
from finetune_trainer.endpoint.journal import Journal


class JournaledClient:
    """A client whose answers are in a journal before anybody sees them."""

    def __init__(self, client: ChatClient, journal: Journal) -> None:
        self._client, self._journal = client, journal
        self._under_way: dict[str, asyncio.Task[ChatAnswer]] = {}

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The answer to a request; the same request asked twice at once is sent once.

        Raises:
            NoAnswer, UserError, ConnectionError: as `ChatClient.complete`.
        """
        key = request.key(self._client.endpoint.model)
        known = self._journal.answers.get(key)
        if known is not None:
            return known
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._pay(key, request))
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    async def settle(self, seconds: float) -> None:
        """Wait so long for what is under way, for it may be paid for already; then give it up."""
        tasks = list(self._under_way.values())
        if not tasks:
            return
        _, pending = await asyncio.wait(tasks, timeout=seconds)
        for task in pending:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pay(self, key: str, request: ChatRequest) -> ChatAnswer:
        answer = await self._client.complete(request)
        self._journal.record(key, answer)
        await self._journal.synced()
        return answer
