"""Asking the teacher, and asking again where an answer can't be read: a bounded number of times."""

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
LONGEST_REPEATED = 4000
"""Characters of an answer that are shown to the teacher again."""


class GaveUp(Exception):
    """The teacher's answers are of no use: why, and the last one."""

    def __init__(self, reason: str, last: str) -> None:
        super().__init__(reason)
        self.reason, self.last = reason, last


@dataclass
class Teacher:
    """How one item asks its teacher; it keeps what its rows' provenance names.

    Args:
        name: the model, as requests and provenance name it.
        attempts: how often an answer is asked for that can be read.
    """

    name: str
    generation: Generation
    attempts: int
    seed: int

    def objects(
        self, template: str, read: Callable[[dict[str, Any]], T], sample: int = 0, **values: Any
    ) -> Generator[Effect, Reply, tuple[T, dict[str, Any]]]:
        """What `read` makes of the JSON object that answers a template, and the request's provenance.

        Raises:
            GaveUp: no answer could be read.
        """
        messages: tuple[Mapping[str, str], ...] = ({"role": "user", "content": prompt(template, **values)},)
        last, fault = "", Malformed("")
        for attempt in range(self.attempts):
            asked = messages if not attempt else (*messages, *_complaint(last, fault))
            request = ChatRequest(asked, self.generation, structured=True, sample=self.seed + sample + attempt)
            answer = yield from _answer(request)
            last = answer.text
            try:
                return read(json_object(last)), {"prompt": version(template), "request": request.key(self.name)}
            except Malformed as error:
                fault = error if answer.finish != "length" else Malformed("it was cut off at its longest")
        raise GaveUp(reasons.MALFORMED, last)

    def reply(self, instruction: str) -> Generator[Effect, Reply, tuple[str, dict[str, Any]]]:
        """The teacher's plain answer to an instruction.

        Raises:
            GaveUp: there is none, or it was cut off.
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
    """The answer that could not be read, and why: greedy decoding would write the same again to the same words."""
    said = last[:LONGEST_REPEATED] or "(nothing)"
    return ({"role": "assistant", "content": said}, {"role": "user", "content": prompt("again", fault=fault)})
