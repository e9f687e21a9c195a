"""Train the answers of reasoning models in the form that they have at inference.

The prompt of such a template ends with an opened thought (`<think>`), so an answer at inference continues inside it. If
the template's text of a last answer does not begin with that, the answer's own thought, which some templates drop, or
an empty one is inserted before it (as in LLaMA-Factory), and the text after the opening carries loss. Some prompts end
with an empty thought, opened and closed: it is inserted before an answer without a thought and carries no loss. Earlier
answers are trained as the template writes them, since prompts show them in that form.
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
    """The end of the prompt, from the opening tag on."""
    opened: str
    """The opening tag, such as `<think>`."""
    close: str
    """The closing tag, such as `</think>`."""

    @property
    def is_closed(self) -> bool:
        """Return whether the prompt closes the thought."""
        return self.close in self.text


def thought_at_end(opening: str) -> Thought | None:
    """Return the thought at the end of a prompt, or None.

    Args:
        opening: the text that the template adds for a reply.
    """
    found = _OPENED.search(opening)
    if found is None:
        return None
    opened = found.group(0)
    return Thought(opening[found.start() :], opened, _CLOSED.get(opened) or f"</{found.group('tag')}>")


def with_thought(text: str, span: Span, thought: Thought | None, message: Message) -> tuple[str, Span]:
    """Return a text whose last answer begins as at inference, and the characters after the prompt.

    Args:
        span: the answer's characters; only white space follows them.
        thought: the thought at the end of a prompt for the answer, if the text lacks it.
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
    elif thought.is_closed or thought.close in body:  # the latter: a model generated it inside of the thought
        inserted = thought.text
    else:
        inserted = f"{thought.text}{_reasoning_of(message, thought)}\n{thought.close}\n\n"
        body = body.lstrip("\n")
    whole = text[:begin] + inserted + body
    return whole + text[end:], (begin + len(thought.text), len(whole))


def _with_dropped(text: str, span: Span, content: str) -> tuple[str, Span]:
    """Return a text with the thought at the beginning of its last answer's content, if the template drops it."""
    (begin, end), (thought, close, rest) = span, content.partition("</think>")
    body = text[begin:end]
    is_there = close in body or text[:begin].rstrip().endswith(close)
    if not close or is_there or not thought.lstrip().startswith("<think>"):
        return text, span
    restored = f"{thought.lstrip()}{close}{rest[: len(rest) - len(rest.lstrip())]}{body.lstrip()}"
    return text[:begin] + restored + text[end:], (begin, begin + len(restored))


def _reasoning_of(message: Message, thought: Thought) -> str:
    """Return a message's reasoning, or ''."""
    content = str(message.get("content") or "")
    before = content.partition(thought.close)[0] if thought.close in content else message.get("reasoning_content")
    return str(before or "").replace(thought.opened, "", 1).strip("\n")
