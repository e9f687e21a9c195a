"""Send requests to the teacher, and retry a bounded number of times if an answer can't be parsed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune_api.generation import Generation
from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Ask, Effect, Failed, Reply
from finetune_trainer.synthesis.parse import Malformed, json_object, without_thinking
from finetune_trainer.synthesis.prompts import prompt, version

T = TypeVar("T")
MAX_REPEATED = 4000
"""Maximum characters of a malformed answer that are sent back to the teacher."""


class GaveUp(Exception):
    """No usable answer: the reason, and the last answer."""

    def __init__(self, reason: str, last: str) -> None:
        super().__init__(reason)
        self.reason, self.last = reason, last


@dataclass
class Teacher:
    """The requests of items to their teacher.

    Args:
        name: the model's name in requests and provenance.
        attempts: maximum number of requests for one parsable answer.
    """

    name: str
    generation: Generation
    attempts: int
    seed: int

    def objects(
        self, template: str, read: Callable[[dict[str, Any]], T], sample: int = 0, **values: Any
    ) -> Generator[Effect, Reply, tuple[T, dict[str, Any]]]:
        """Send a prompt template; return `read` of the JSON object in the answer, and the request's provenance.

        Raises:
            GaveUp: no answer could be parsed.
        """
        messages: tuple[Mapping[str, str], ...] = ({"role": "user", "content": prompt(template, **values)},)
        last, fault = "", Malformed("")
        for attempt in range(self.attempts):
            sent = messages if not attempt else (*messages, *_complaint(last, fault))
            request = ChatRequest(sent, self.generation, structured=True, sample=self.seed + sample + attempt)
            answer = yield from _answer(request)
            last = answer.text
            try:
                return read(json_object(last)), {"prompt": version(template), "request": request.key(self.name)}
            except Malformed as error:
                fault = error if answer.finish != "length" else Malformed("it was cut off at its longest")
        raise GaveUp(reasons.MALFORMED, last)

    def reply(self, instruction: str) -> Generator[Effect, Reply, tuple[str, dict[str, Any]]]:
        """Return the teacher's plain answer to an instruction, and the request's provenance.

        Raises:
            GaveUp: there is no answer, or it was cut off.
        """
        request = ChatRequest(({"role": "user", "content": instruction},), self.generation, sample=self.seed)
        answer = yield from _answer(request)
        if answer.finish == "length":
            raise GaveUp(reasons.CUT, answer.text)
        return without_thinking(answer.text), {"request": request.key(self.name)}


def _answer(request: ChatRequest) -> Generator[Effect, Reply, ChatAnswer]:
    reply = yield Ask(request)
    if isinstance(reply, Failed):
        raise GaveUp(reply.reason, reply.detail)
    assert isinstance(reply, ChatAnswer)
    return reply


def _complaint(last: str, fault: Malformed) -> tuple[Mapping[str, str], ...]:
    """Return messages with the malformed answer and its fault: greedy decoding repeats itself for equal prompts."""
    shown = last[:MAX_REPEATED] or "(nothing)"
    return ({"role": "assistant", "content": shown}, {"role": "user", "content": prompt("again", fault=fault)})
