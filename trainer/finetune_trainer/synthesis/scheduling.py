"""Run items to their outcomes: concurrently against a server, or in lockstep with other workers and a local model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from finetune_trainer.synthesis.effects import Effect, Item, Outcome, Reply, Work


@dataclass
class Results:
    """Outcomes by item, in any order."""

    total: int
    outcomes: dict[int, list[Outcome]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Return the number of finished items."""
        return len(self.outcomes)

    def in_order(self) -> list[Outcome]:
        """Return all outcomes in the order of their items."""
        return [outcome for index in sorted(self.outcomes) for outcome in self.outcomes[index]]


async def run_concurrently(
    items: Sequence[Item], reply: Callable[[Effect], Awaitable[Reply]], concurrency: int, results: Results
) -> None:
    """Run every item to its end, `concurrency` of them at a time."""
    waiting = iter(enumerate(items))

    async def work() -> None:
        for index, item in waiting:
            results.outcomes[index] = await _run_item(item.work(), reply)

    async with asyncio.TaskGroup() as group:
        for _ in range(max(1, min(concurrency, len(items)))):
            group.create_task(work())


async def _run_item(work: Work, reply: Callable[[Effect], Awaitable[Reply]]) -> list[Outcome]:
    try:
        effect = next(work)
        while True:
            effect = work.send(await reply(effect))
    except StopIteration as end:
        outcomes: list[Outcome] = end.value
        return outcomes


def run_in_lockstep(
    items: Sequence[Item],
    reply_all: Callable[[list[Effect]], list[Reply]],
    window: int,
    results: Results,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run every item to its end, `window` of them in lockstep: their pending effects get replies in one batch.

    The order does not depend on the speed of replies, so several processes run the same steps.

    Args:
        after: called after each step.
    """
    waiting, running = iter(enumerate(items)), dict[int, tuple[Work, Effect]]()
    while True:
        while len(running) < window and (entry := next(waiting, None)) is not None:
            _begin(entry[0], entry[1].work(), running, results)
        if not running:
            return
        order = sorted(running)
        replies = reply_all([running[index][1] for index in order])
        for index, reply in zip(order, replies, strict=True):
            _resume(index, reply, running, results)
        after()


def _begin(index: int, work: Work, running: dict[int, tuple[Work, Effect]], results: Results) -> None:
    try:
        running[index] = (work, next(work))
    except StopIteration as end:
        results.outcomes[index] = end.value


def _resume(index: int, reply: Reply, running: dict[int, tuple[Work, Effect]], results: Results) -> None:
    work, _ = running.pop(index)
    try:
        running[index] = (work, work.send(reply))
    except StopIteration as end:
        results.outcomes[index] = end.value
