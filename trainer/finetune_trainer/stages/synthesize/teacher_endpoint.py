"""Teacher behind an HTTP endpoint, which processes items concurrently in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from finetune_api.endpoint import Endpoint
from finetune_trainer.endpoint.client import ChatClient, NoAnswer
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.endpoint.journaled_client import JournaledClient
from finetune_trainer.queries.result import QueryFailed, QueryResult
from finetune_trainer.queries.sandbox import Sandbox
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Ask, Effect, Failed, Item, Reply
from finetune_trainer.synthesis.scheduling import Results, run_concurrently
from finetune_trainer.training.stage_io import StageIO

LOOK_SECONDS = 0.2
"""Interval between checks whether the driver requests a stop."""
SETTLE_SECONDS = 20.0
"""Timeout of pending requests when the stage stops. They are awaited because the endpoint may bill them."""


class EndpointTeacher:
    """A teacher whose answers come from an endpoint, and whose queries run in sandboxes."""

    def __init__(self, endpoint: Endpoint, where: str, journal: Journal, sandboxes: Sequence[Sandbox]) -> None:
        self._endpoint, self._where, self._journal = endpoint, f"{where}.teacher.endpoint", journal
        self._all_sandboxes = list(sandboxes)

    async def answer_all(self, items: Sequence[Item], results: Results, tools: StageIO) -> bool:
        """Process all items; return False if the driver requested a stop before the end.

        Raises:
            UserError: the server refuses every request.
            ConnectionError: the server is no longer reachable.
        """
        self._free: asyncio.Queue[Sandbox] = asyncio.Queue()
        for sandbox in self._all_sandboxes:
            self._free.put_nowait(sandbox)
        async with ChatClient(self._endpoint, self._where) as client:
            self._client = JournaledClient(client, self._journal)
            pushing = asyncio.create_task(self._journal.keep_pushing())
            # Twice as many items as concurrent requests, because some items wait for queries or retries.
            driving = asyncio.create_task(run_concurrently(items, self._reply, 2 * self._endpoint.concurrency, results))
            try:
                return await self._watched(driving, results, tools)
            finally:
                pushing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pushing

    async def _watched(self, driving: asyncio.Task[None], results: Results, tools: StageIO) -> bool:
        while not driving.done():
            await asyncio.wait({driving}, timeout=LOOK_SECONDS)
            tools.progress(results.done, results.total)
            if not driving.done() and tools.stop_requested():
                driving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await driving
                await self._client.settle(min(SETTLE_SECONDS, self._endpoint.timeout_seconds))
                return False
        try:
            driving.result()
        except BaseExceptionGroup as group:
            await self._client.settle(SETTLE_SECONDS)
            raise _first(group) from group
        return True

    async def _reply(self, effect: Effect) -> Reply:
        if isinstance(effect, Ask):
            try:
                return await self._client.ask(effect.request)
            except NoAnswer as error:
                return Failed(reasons.NO_ANSWER, str(error))
        sandbox = await self._free.get()
        try:
            return await asyncio.to_thread(run_query, sandbox, effect.query)
        finally:
            self._free.put_nowait(sandbox)


def run_query(sandbox: Sandbox, query: str) -> QueryResult | Failed:
    """Return the result of a query, or the reason for its failure."""
    try:
        return sandbox.run(query)
    except QueryFailed as error:
        return Failed(reasons.OF_FAILURE[error.kind], str(error))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
