"""Thoughts of reasoning models: what a prompt opens (`<think>`) is closed by the answer.

The prompt of such a template ends with an opened thought, so an answer at inference goes on inside of it. Where the
template's text of a last answer does not begin with that, the answer is trained in the same form: its own thought,
which some templates drop, or an empty one goes before it (as LLaMA-Factory does it), and what follows the opening
carries loss. Some prompts end with an empty thought, open and closed: it goes before an answer without a thought and
carries no loss. Earlier answers are trained as the template writes them, since a prompt shows them so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_trainer.data.messages import Message
from finetune_trainer.data.template import Span

_OPENED = re.compile(r"<(?P<tag>\w*think\w*|thought|reasoning)>|\[THINK\]|<\|channel>thought|<\|START_THINKING\|>")
_CLOSED = {"[THINK]": "[/THINK]", "<|channel>thought": "<channel|>", "<|START_THINKING|>": "<|END_THINKING|>"}


@dataclass(frozen=True)
class Thought:
    """A thought at the end of a prompt."""

    text: str
    """The prompt's end, from what opens the thought on."""
    opened: str
    """What opens it, such as `<think>`."""
    close: str
    """What closes it, such as `</think>`."""

    @property
    def is_closed(self) -> bool:
        return self.close in self.text


def thought_at_end(opening: str) -> Thought | None:
    """Return the thought that a prompt ends with, or None.

    Args:
        opening: what the template adds to a conversation where a reply is to come.
    """
    found = _OPENED.search(opening)
    if found is None:
        return None
    opened = found.group(0)
    return Thought(opening[found.start() :], opened, _CLOSED.get(opened) or f"</{found.group('tag')}>")


def with_thought(text: str, span: Span, thought: Thought | None, message: Message) -> tuple[str, Span]:
    """Return a text whose last answer begins as one at inference does, and the characters that follow the prompt.

    Args:
        span: the answer's characters. But for white space, they end with the text.
        thought: what a prompt for the answer ends with and the text does not have before it.
    """
    begin, end = span
    body = text[begin:end]
    if thought is None:
        return _with_dropped(text, span, str(message.get("content") or ""))
    own = body.lstrip().startswith(thought.opened)
    if own and thought.is_closed:
        return text, span
    if own:  # only the white space after the opening differs
        inserted, body = thought.text, body.lstrip().removeprefix(thought.opened).lstrip()
    elif thought.is_closed or thought.close in body:  # the latter: drawn from a model, inside of the thought
        inserted = thought.text
    else:
        inserted = f"{thought.text}{_said(message, thought)}\n{thought.close}\n\n"
        body = body.lstrip("\n")
    whole = text[:begin] + inserted + body
    return whole + text[end:], (begin + len(thought.text), len(whole))


def _with_dropped(text: str, span: Span, content: str) -> tuple[str, Span]:
    """Return a text with the thought that its last answer's content begins with, where the template leaves it out."""
    (begin, end), (thought, close, rest) = span, content.partition("</think>")
    body = text[begin:end]
    is_there = close in body or text[:begin].rstrip().endswith(close)
    if not close or is_there or not thought.lstrip().startswith("<think>"):
        return text, span
    said = f"{thought.lstrip()}{close}{rest[: len(rest) - len(rest.lstrip())]}{body.lstrip()}"
    return text[:begin] + said + text[end:], (begin, begin + len(said))


def _said(message: Message, thought: Thought) -> str:
    """Return what a message thinks; '' where it does not."""
    content = str(message.get("content") or "")
    before = content.partition(thought.close)[0] if thought.close in content else message.get("reasoning_content")
    return str(before or "").replace(thought.opened, "", 1).strip("\n")
