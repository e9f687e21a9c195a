"""Find the assistant's turns in the text of a conversation.

A turn begins where a prompt for it ends, so that it holds exactly what the model has to write. It ends with the answer;
`ChatTemplate.stopped` then adds the stop token.

Marked templates have `{% generation %}` blocks around the turns. A block that begins with a part of the prompt is cut.
If the number of blocks differs from the number of turns, or a block lacks its answer's text, the turns are found as for
unmarked templates:

- The conversation before the turn, as a prompt, and the conversation through the turn are rendered separately. The
  whole text begins with both.
- Some templates write earlier messages differently once more messages follow: Mistral's puts the system message into
  the last user's turn, Qwen3's drops reasoning of earlier turns. Then the text is rendered with one message changed;
  the first difference is the position of that message. The ends of the prompt and of the turn are searched around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix

from finetune_trainer.data.messages import Message
from finetune_trainer.data.reasoning import Thought, thought_at_end
from finetune_trainer.data.template import PROBE, ChatError, ChatTemplate, Span, Tools
from finetune_trainer.data.template_messages import is_written_in

REACH = 256
"""Number of characters at the end of a text that are compared."""


@dataclass(frozen=True)
class Turn:
    """An assistant's turn."""

    message: int
    """Index of its message."""
    span: Span
    """Its characters, without the stop token if the template writes that with the next message."""
    thought: Thought | None = None
    """The reasoning at the end of a prompt for the turn that the text lacks."""


def find_turns(template: ChatTemplate, messages: list[Message], tools: Tools, marked: bool) -> tuple[str, list[Turn]]:
    """Return a conversation's text and the assistant's turns in it, in order.

    Args:
        marked: whether the template has `{% generation %}` blocks.

    Raises:
        ChatError: the template refuses the conversation, or a turn can't be separated from the rest of the text.
    """
    text, marks = template.marked(messages, tools) if marked else (template.text(messages, tools), [])
    conversation = _Conversation(template, messages, tools, text)
    turns = conversation.marked(marks) if marked else None
    return text, [conversation.turn(index) for index in conversation.indices] if turns is None else turns


@dataclass(frozen=True)
class _Conversation:
    template: ChatTemplate
    messages: list[Message]
    tools: Tools
    text: str
    indices: list[int] = field(init=False)
    """Indices of the assistant's messages."""

    def __post_init__(self) -> None:
        indices = [at for at, message in enumerate(self.messages) if message["role"] == "assistant"]
        object.__setattr__(self, "indices", indices)

    def marked(self, marks: list[Span]) -> list[Turn] | None:
        """Return the turns by their marks; None if their number differs or one lacks its answer's text."""
        spans = _joined(marks)
        if len(spans) != len(self.indices):
            return None
        turns = [self._cut(at, span) for at, span in zip(self.indices, spans, strict=True)]
        return turns if all(self._is_complete(turn) for turn in turns) else None

    def _cut(self, at: int, span: Span) -> Turn:
        """Return a marked turn without the part of the prompt at its beginning."""
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
        """Return possible ends of a prompt in the text, longest first, each with the reasoning that it then lacks."""
        opening = self.template.opening
        thought = thought_at_end(opening)
        return [(opening, None), *([] if thought is None else [(opening.removesuffix(thought.text), thought)])]

    def turn(self, at: int) -> Turn:
        """Return the turn of an assistant's message by comparing renderings.

        Raises:
            ChatError: the turn can't be separated from the rest of the text, or lacks the answer.
        """
        found = self._by_prefix(at)
        if found is None or not self._is_complete(found):
            found = self._by_difference(at)
        if not self._is_complete(found):
            raise self._changed_text(at)
        return found

    def _by_prefix(self, at: int) -> Turn | None:
        start = self._start(at)
        if start is None:
            return None
        begin, thought = start
        end = self._answer_end(at, begin) or self._through_end(at)
        return None if end is None else Turn(at, (min(begin, end), end), thought)

    def _start(self, at: int) -> tuple[int, Thought | None] | None:
        """Return where a prompt for a turn ends, if the text begins with it or differs only in the reply's opening."""
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
        """Return where an answer's text ends, if the template writes it unchanged and stop tokens follow."""
        content = str(self.messages[at].get("content") or "").strip()
        if not content or self.messages[at].get("tool_calls"):
            return None
        end = self.text.find(content, begin) + len(content)
        return end if end >= begin + len(content) and self.template.stops_at(self.text, end) else None

    def _through_end(self, at: int) -> int | None:
        through = self._through(at)
        return len(through) if through is not None and self.text.startswith(through) else None

    def _by_difference(self, at: int) -> Turn:
        indices = [self._change(index) for index in (at - 1, at, at + 1)]
        through = self._through(at)
        before, here, after = indices
        if here is None:
            raise self._changed_text(at)
        if before is None or after is None or through is None:
            raise _ambiguous_turn(at)
        begin, thought = self._begin(at, before, here)
        end = self._answer_end(at, begin)
        if end is not None and end <= after:
            return Turn(at, (begin, end), thought)
        end, shared = _align(self.text, through, max(begin, here), after)
        content = str(self.messages[at].get("content") or "").strip()
        if not shared and not (content and self.text.startswith(content, here)):
            raise _ambiguous_turn(at)
        return Turn(at, (begin, end if shared else here + len(content)), thought)

    def _begin(self, at: int, before: int, here: int) -> tuple[int, Thought | None]:
        """Return where a prompt most likely ends, between the texts of the previous message and of the answer."""
        content = str(self.messages[at - 1].get("content") or "").strip() if at else ""
        low = before + len(content) if self.text.startswith(content, before) else before
        prompt = self._prompt(at) or self.template.attempt([{"role": "user", "content": PROBE}], generation=True) or ""
        thought = thought_at_end(self.template.opening)
        if thought is not None and prompt.endswith(thought.text):
            begin, shared = _align(self.text, prompt.removesuffix(thought.text), low, here)
            if shared and not self.text.startswith(thought.text, begin):
                return begin, thought
        begin, shared = _align(self.text, prompt, low, here)
        return (begin if shared else len(self.text[:here].rstrip(" "))), None  # an answer's leading spaces belong to it

    def _change(self, at: int) -> int | None:
        """Return the first character of the text that depends on the content of message `at`, or None.

        The result is 0 before the first message and the text's length after the last one.
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

    def _changed_text(self, at: int) -> ChatError:
        what = "tool calls" if self.messages[at].get("tool_calls") else "text"
        return ChatError(f"the chat template changes the {what} of message {at} (assistant)")

    def _is_complete(self, turn: Turn) -> bool:
        """Return whether a turn has its answer (without reasoning) and the names of called tools."""
        content, message = self.text[slice(*turn.span)], self.messages[turn.message]
        answer = str(message.get("content") or "").rpartition("</think>")[2]
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        return is_written_in(content, answer) and all(str(call.get("name")) in content for call in calls)


def _joined(marks: Sequence[Span]) -> list[Span]:
    """Return marks as non-empty spans; spans that touch are joined."""
    spans: list[Span] = []
    for begin, end in marks:
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        elif begin < end:
            spans.append((begin, end))
    return spans


def _shared(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    return len(commonprefix([first, second]))  # noqa: RUF071 (of texts, not of paths)


def _align(text: str, pattern: str, low: int, high: int) -> tuple[int, int]:
    """Return the position in `low` to `high` where the text before it shares most of a pattern's end, and how much."""
    backwards = pattern[: -REACH - 1 : -1]
    shared = [(_shared(text[max(0, at - REACH) : at][::-1], backwards), at) for at in range(low, high + 1)]
    most, at = max(shared, default=(0, high))
    return at, most


def _ambiguous_turn(at: int) -> ChatError:
    return ChatError(
        f"the chat template renders the conversation differently once more messages follow, so the text of message "
        f"{at} (assistant) can't be separated from the rest: use a tokenizer whose template has `{{% generation %}}`"
    )
