"""Where the assistant's turns are in the text of a conversation.

A turn begins where a prompt for it ends, so that it holds what the model has to write by itself and nothing else. It
ends with the answer; `ChatTemplate.stopped` then adds the stop token.

Marked templates say by `{% generation %}` blocks where the turns are. A block that begins with a part of the prompt is
cut. Where there are not as many blocks as turns, or one lacks its answer's text, the turns are found as in others:

- The conversation up to the turn, as a prompt, and through it are rendered apart. The whole text begins with both.
- Some templates write earlier messages differently once more follow: Mistral's puts the system message into the last
  user's turn, Qwen3's drops thoughts of earlier turns. Then the text is rendered with one message changed: where it
  changes is that message. Around it, the ends of the prompt and of the text through the turn are looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix

from finetune_trainer.data.messages import Message
from finetune_trainer.data.reasoning import Thought, thought_at_end
from finetune_trainer.data.template import PROBE, ChatError, ChatTemplate, Span, Tools
from finetune_trainer.data.template_messages import traced

REACH = 256
"""Characters of a text's end that are compared."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn."""

    message: int
    """Its place among the messages."""
    span: Span
    """Its characters, without the stop token where the template gives that to the next message."""
    thought: Thought | None = None
    """What a prompt for the turn ends with and the text lacks."""


def find_turns(template: ChatTemplate, messages: list[Message], tools: Tools, marked: bool) -> tuple[str, list[Turn]]:
    """Return a conversation's text and the assistant's turns in it, in order.

    Args:
        marked: whether the template has `{% generation %}` blocks.

    Raises:
        ChatError: the template refuses the conversation, or a turn can't be told from the rest of the text.
    """
    text, marks = template.marked(messages, tools) if marked else (template.text(messages, tools), [])
    conversation = _Conversation(template, messages, tools, text)
    turns = conversation.marked(marks) if marked else None
    return text, [conversation.turn(place) for place in conversation.places] if turns is None else turns


@dataclass(frozen=True)
class _Conversation:
    template: ChatTemplate
    messages: list[Message]
    tools: Tools
    text: str
    places: list[int] = field(init=False)
    """The assistant's messages."""

    def __post_init__(self) -> None:
        places = [at for at, message in enumerate(self.messages) if message["role"] == "assistant"]
        object.__setattr__(self, "places", places)

    def marked(self, marks: list[Span]) -> list[Turn] | None:
        """Return the turns by their marks; None where there are not as many, or where one lacks its answer's text."""
        spans = _joined(marks)
        if len(spans) != len(self.places):
            return None
        turns = [self._cut(at, span) for at, span in zip(self.places, spans, strict=True)]
        return turns if all(self._holds(turn) for turn in turns) else None

    def _cut(self, at: int, span: Span) -> Turn:
        """Return a marked turn without the part of a prompt that its mark begins with."""
        if at and self.messages[at - 1]["role"] == "tool":  # a prompt after a tool's result has no usual opening
            prompt = self._prompt(at) or ""
            if self.text.startswith(prompt) and span[0] < len(prompt) < span[1]:
                return Turn(at, (len(prompt), span[1]))
        for opening, thought in self._openings:
            low, high = max(0, span[0] - len(opening)), min(span[0] + len(opening), span[1])
            begin = self.text.rfind(opening, low, high) if opening else -1
            if begin >= 0:
                return Turn(at, (begin + len(opening), span[1]), thought)
        return Turn(at, span)

    @cached_property
    def _openings(self) -> list[tuple[str, Thought | None]]:
        """What a prompt may end with in the text, longest first, and what of the thought at its end is then lacking."""
        opening = self.template.opening
        thought = thought_at_end(opening)
        return [(opening, None), *([] if thought is None else [(opening.removesuffix(thought.text), thought)])]

    def turn(self, at: int) -> Turn:
        """Return the turn of an assistant's message, by renderings.

        Raises:
            ChatError: it can't be told from the rest of the text, or lacks the answer.
        """
        found = self._by_prefix(at)
        if found is None or not self._holds(found):
            found = self._by_difference(at)
        if not self._holds(found):
            raise self._unwritten(at)
        return found

    def _by_prefix(self, at: int) -> Turn | None:
        start = self._start(at)
        if start is None:
            return None
        begin, thought = start
        end = self._answer_end(at, begin) or self._through_end(at)
        return None if end is None else Turn(at, (min(begin, end), end), thought)

    def _start(self, at: int) -> tuple[int, Thought | None] | None:
        """Return where a prompt for a turn ends, if the text begins with it or differs within what opens a reply."""
        prompt = self._prompt(at)
        if prompt is None or self.text.startswith(prompt):
            return None if prompt is None else (len(prompt), None)
        opening, shared = self.template.opening, _shared(self.text, prompt)
        if not opening or not prompt.endswith(opening) or shared < len(prompt) - len(opening):
            return None
        thought = thought_at_end(opening)
        bare = len(prompt) - (0 if thought is None else len(thought.text))
        return (bare, thought) if shared >= bare else (shared, None)

    def _answer_end(self, at: int, begin: int) -> int | None:
        """Return where an answer's text ends, if the template writes it as it is, and the stop tokens after it."""
        content = str(self.messages[at].get("content") or "").strip()
        if not content or self.messages[at].get("tool_calls"):
            return None
        end = self.text.find(content, begin) + len(content)
        return end if end >= begin + len(content) and self.template.stops_at(self.text, end) else None

    def _through_end(self, at: int) -> int | None:
        through = self._through(at)
        return len(through) if through is not None and self.text.startswith(through) else None

    def _by_difference(self, at: int) -> Turn:
        places = [self._change(place) for place in (at - 1, at, at + 1)]
        through = self._through(at)
        before, here, after = places
        if here is None:
            raise self._unwritten(at)
        if before is None or after is None or through is None:
            raise _ambiguous(at)
        begin, thought = self._begin(at, before, here)
        end = self._answer_end(at, begin)
        if end is not None and end <= after:
            return Turn(at, (begin, end), thought)
        end, shared = _aligned(self.text, through, max(begin, here), after)
        said = str(self.messages[at].get("content") or "").strip()
        if not shared and not (said and self.text.startswith(said, here)):
            raise _ambiguous(at)
        return Turn(at, (begin, end if shared else here + len(said)), thought)

    def _begin(self, at: int, before: int, here: int) -> tuple[int, Thought | None]:
        """Return where a prompt ends most likely, between what the message before and the answer say."""
        said = str(self.messages[at - 1].get("content") or "").strip() if at else ""
        low = before + len(said) if self.text.startswith(said, before) else before
        prompt = self._prompt(at) or self.template.attempt([{"role": "user", "content": PROBE}], generation=True) or ""
        thought = thought_at_end(self.template.opening)
        if thought is not None and prompt.endswith(thought.text):
            begin, shared = _aligned(self.text, prompt.removesuffix(thought.text), low, here)
            if shared and not self.text.startswith(thought.text, begin):
                return begin, thought
        begin, shared = _aligned(self.text, prompt, low, here)
        return (begin if shared else len(self.text[:here].rstrip(" "))), None  # an answer's blanks belong to it

    def _change(self, at: int) -> int | None:
        """Return the first character of the text that depends on what message `at` says; None where none does.

        Before the first message it is 0, after the last one the text's length.
        """
        if not 0 <= at < len(self.messages):
            return 0 if at < 0 else len(self.text)
        message = self.messages[at]
        for changed in ({"role": message["role"], "content": PROBE}, {**message, "content": PROBE}):
            other = self.template.attempt([*self.messages[:at], changed, *self.messages[at + 1 :]], self.tools)
            if other is not None and PROBE in other and other != self.text:
                return _shared(self.text, other)
        return None

    def _prompt(self, at: int) -> str | None:
        return self.template.attempt(self.messages[:at], self.tools, generation=True) if at else None

    def _through(self, at: int) -> str | None:
        through = self.template.attempt(self.messages[: at + 1], self.tools)
        return None if through is None else through.rstrip()

    def _unwritten(self, at: int) -> ChatError:
        what = "tool calls" if self.messages[at].get("tool_calls") else "text"
        return ChatError(f"the chat template does not write the {what} of message {at} (assistant) as it is")

    def _holds(self, turn: Turn) -> bool:
        """Whether a turn has its answer (without thoughts) and tools' names, and not the text of the message before."""
        said, message = self.text[slice(*turn.span)], self.messages[turn.message]
        answer = str(message.get("content") or "").rpartition("</think>")[2]
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        return traced(said, answer) and all(str(call.get("name")) in said for call in calls)


def _joined(marks: Sequence[Span]) -> list[Span]:
    """Return marks as spans that are not empty and do not touch."""
    spans: list[Span] = []
    for begin, end in marks:
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif begin < end:
            spans.append((begin, end))
    return spans


def _shared(first: str, second: str) -> int:
    """Characters that two texts have in common from their start."""
    return len(commonprefix([first, second]))  # noqa: RUF071 (of texts, not of paths)


def _aligned(text: str, pattern: str, low: int, high: int) -> tuple[int, int]:
    """Return the place from `low` to `high` up to which a text ends most like a pattern, and how much they share."""
    backwards = pattern[: -REACH - 1 : -1]
    shared = [(_shared(text[max(0, at - REACH) : at][::-1], backwards), at) for at in range(low, high + 1)]
    most, at = max(shared, default=(0, high))
    return at, most


def _ambiguous(at: int) -> ChatError:
    return ChatError(
        f"the chat template renders the conversation differently once more messages follow, so the text of message "
        f"{at} (assistant) can't be told from the rest: use a tokenizer whose template has `{{% generation %}}`"
    )
