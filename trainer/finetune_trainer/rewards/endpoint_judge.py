"""A judge model behind an endpoint, which rates all answers to a prompt in one request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable
from functools import cached_property
from typing import Any

from finetune_api.endpoint import Endpoint
from finetune_api.generation import Generation
from finetune_trainer.endpoint.chat import ChatRequest
from finetune_trainer.endpoint.client import ChatClient, NoAnswer
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.endpoint.journaled_client import JournaledClient
from finetune_trainer.rewards.functions import text_of

CRITERIA = "Prefer answers that are right, to the point, clear and harmless."
TRIES = 3
"""Maximum requests for one prompt's ratings; a reply that can't be parsed counts as one."""
SETTLE_SECONDS = 30.0
LENGTH = 512

_TASK = """You are an impartial judge. Rate {count} answers to the last message of a conversation. {criteria}

# Conversation
{conversation}

{answers}

Give each answer a number from 1 (worst) to 10 (best); give different answers different numbers where you can.
Reply with one JSON object and nothing else: {{"scores": [{count} numbers, in the order of the answers]}}"""


class EndpointJudge:
    """A judge that asks a chat model; see `judge.Ranks`.

    The answers are shown in a random order derived from their prompt, so that no position is favored.

    Args:
        where: the endpoint's path in the job, for messages.
        journal: a function that opens the journal of earlier replies.
    """

    def __init__(self, endpoint: Endpoint, where: str, criteria: str | None, journal: Callable[[], Journal]) -> None:
        self.endpoint, self.where, self.criteria = endpoint, where, criteria or CRITERIA
        self._open = journal
        self._loop = asyncio.new_event_loop()  # one for all calls: the journal's locks belong to it

    def __call__(
        self, prompts: list[Any], answers: list[list[Any]], ids: list[Any], rows: list[Any]
    ) -> list[list[float | None]]:
        """Return ratings, see `judge.Ranks`; None for prompts without a usable reply.

        Raises:
            UserError: the server refuses every request.
            ConnectionError: the server has not answered for ten minutes.
        """
        return self._loop.run_until_complete(self._rate_all(list(zip(prompts, answers, strict=True))))

    @cached_property
    def journal(self) -> Journal:
        """Return the journal, which is opened on first use."""
        return self._open()

    async def _rate_all(self, pairs: list[tuple[Any, list[Any]]]) -> list[list[float | None]]:
        async with ChatClient(self.endpoint, self.where) as client:
            journaled = JournaledClient(client, self.journal)
            try:
                return list(await asyncio.gather(*(self._rate(journaled, *one) for one in pairs)))
            finally:
                await journaled.settle(SETTLE_SECONDS)
                self.journal.sync()

    async def _rate(self, client: JournaledClient, prompt: Any, answers: list[Any]) -> list[float | None]:
        order = shown_order(prompt, len(answers))
        request = self._request(prompt, [answers[index] for index in order])
        for sample in range(TRIES):
            try:
                answer = await client.ask(
                    ChatRequest(request, Generation.model_validate({"maxNewTokens": LENGTH}), True, sample)
                )
            except NoAnswer:
                continue
            scores = read_scores(answer.text, len(answers))
            if scores is not None:
                by_index = dict(zip(order, scores, strict=True))
                return [by_index[index] for index in range(len(answers))]
        return [None] * len(answers)

    def _request(self, prompt: Any, answers: list[Any]) -> tuple[dict[str, str], ...]:
        shown = "\n\n".join(f"# Answer {number}\n{text_of(one)}" for number, one in enumerate(answers, 1))
        task = _TASK.format(
            count=len(answers), criteria=self.criteria, conversation=_conversation(prompt), answers=shown
        )
        return ({"role": "user", "content": task},)


def shown_order(prompt: Any, count: int) -> list[int]:
    """Return the order in which a prompt's answers are shown, which depends on the prompt alone."""
    seed = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return random.Random(seed).sample(range(count), count)


def read_scores(text: str, count: int) -> list[float] | None:
    """Return the ratings in a judge's reply, which may have text around the JSON; None if it has none."""
    start, end = text.find("{"), text.rfind("}")
    try:
        scores = json.loads(text[start : end + 1])["scores"]
        numbers = [float(score) for score in scores if not isinstance(score, bool)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = len(numbers) == count and all(abs(number) < 1e9 for number in numbers)
    return numbers if good else None


def _conversation(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
