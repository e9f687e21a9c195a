"""Conversations as tokens: rendered by the tokenizer's chat template, with the assistant's tokens known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.data.messages import Message, name_tool_role

Span = tuple[int, int]


class ChatError(ValueError):
    """A conversation that the chat template can't render, or whose assistant turns can't be told from the rest."""


@dataclass(frozen=True)
class Encoded:
    """Tokens with their spans of characters in the text they came from, and a 0/1 mask of the trained ones."""

    ids: list[int]
    starts: list[int]
    mask: list[int]


class ChatFormat:
    """A tokenizer with the chat template that training uses.

    The template is the tokenizer's own where it marks assistant turns by `{% generation %}`, else TRL's training
    twin of it, else the tokenizer's own with the turns found by rendering the conversation message by message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        template = tokenizer.chat_template
        self.template: str | None = template["default"] if isinstance(template, dict) else template
        from trl.chat_template_utils import has_generation_markers  # takes seconds to import, for dialogues alone

        if self.template is not None and not has_generation_markers(self.template):
            self.template = _training_twin(tokenizer) or self.template
        self.marked = self.template is not None and has_generation_markers(self.template)

    def render(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The conversation's text and the characters of each assistant turn with its end-of-turn token."""
        if not self.marked:
            return self._render_stepwise(messages)
        text, spans = self._jinja(messages, mask=True)
        return text, [(start, end) for start, end in spans]

    def prompt(self, messages: list[Message]) -> str:
        """The text that a reply to `messages` starts from."""
        return self._jinja(messages, generation=True)[0] if messages else ""

    def reply(self, prompt: list[Message], messages: list[Message]) -> tuple[str, list[Span], int]:
        """Prompt and answer as one text, the answer's assistant spans, and the character where the answer starts."""
        text, spans = self.render(prompt + messages)
        start_text = self.prompt(prompt)
        start = len(start_text) if text.startswith(start_text) else _shared_length(text, start_text)
        return text, [(max(begin, start), end) for begin, end in spans if end > start], start

    def encode(self, text: str, spans: list[Span]) -> Encoded:
        """Tokens of a rendered text; a token is trained where it begins inside a span."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        return Encoded(encoding.ids, starts, mask_of(starts, spans))

    def _jinja(self, messages: list[Message], mask: bool = False, generation: bool = False) -> tuple[str, list[Span]]:
        special: dict[str, Any] = self.tokenizer.special_tokens_map
        render: Callable[..., tuple[list[str], list[list[Span]]]] = cast(Any, render_jinja_template)
        try:
            texts, spans = render(
                [name_tool_role(messages, self.template or "")],
                chat_template=self.template,
                return_assistant_tokens_mask=mask,
                add_generation_prompt=generation,
                **special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ChatError(f"the chat template refuses the conversation: {error}") from error
        return texts[0], spans[0] if mask else []

    def _render_stepwise(self, messages: list[Message]) -> tuple[str, list[Span]]:
        text = self._jinja(messages)[0]
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._turn(messages, index, text))
        return text, spans

    def _turn(self, messages: list[Message], index: int, text: str) -> Span:
        before = self._jinja(messages[:index], generation=True)[0] if index else ""
        through = self._jinja(messages[: index + 1])[0].rstrip()
        if index and before == self._jinja(messages[:index])[0]:
            raise ChatError("the chat template marks no `{% generation %}` and ignores `add_generation_prompt`")
        if not through.startswith(before.rstrip()) or not text.startswith(through):
            raise ChatError(
                "the chat template marks no `{% generation %}` and renders earlier messages differently when more "
                "follow, so the assistant's tokens can't be told: use a tokenizer whose template has `{% generation %}`"
            )
        return min(len(before), len(through)), len(through)


def mask_of(starts: list[int], spans: list[Span]) -> list[int]:
    """1 for each token that begins inside a span. Both lists ascend."""
    mask = [0] * len(starts)
    token = 0
    for begin, end in spans:
        while token < len(starts) and starts[token] < begin:
            token += 1
        while token < len(starts) and starts[token] < end:
            mask[token] = 1
            token += 1
    return mask


def _shared_length(first: str, second: str) -> int:
    """Characters that two texts have in common from their start."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _training_twin(tokenizer: PreTrainedTokenizerFast) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        twin: str | None = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):
        return None
    return twin
