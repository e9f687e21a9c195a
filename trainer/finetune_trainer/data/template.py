"""Render conversations with a chat template, and find the tokens that it writes before and after an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import takewhile
from os.path import commonprefix
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.data.messages import Message, name_tool_role

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

PROBE, OTHER_PROBE = "\ue000probe\ue000", "\ue001other\ue001"
"""Texts that no conversation or template contains, which show where a template writes a message's text."""
_OTHER: Message = {"role": "user", "content": OTHER_PROBE}
_INNER = re.compile("tool.?call|think", re.IGNORECASE)
"""Special tokens that end only a part of an answer, such as `<tool_call|>`."""
_MARKER = re.compile(r"[<\[]\S+[>\]]")


class ChatError(ValueError):
    """A conversation that the chat template refuses, or whose assistant turns can't be found in its text."""


class ChatTemplate:
    """A chat template with the special tokens of its tokenizer.

    Args:
        source: the template's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.source = source
        self.special: dict[str, Any] = tokenizer.special_tokens_map
        self.bos, self.eos = tokenizer.bos_token, tokenizer.eos_token
        self._markers = _markers(tokenizer)
        self._next = re.compile(rf"\s*({_any_of(self._markers)})")
        ending = [text for text, special in self._markers.items() if special and not _INNER.search(text)]
        self._ended = re.compile(rf"(?:{_any_of(ending)})$")

    def text(self, messages: list[Message], tools: Tools = None, *, generation: bool = False) -> str:
        """Return the text of a conversation, up to where a reply begins if `generation` is true.

        Raises:
            ChatError: the template refuses the conversation.
        """
        return self._render(messages, tools, generation=generation)[0]

    def attempt(self, messages: list[Message], tools: Tools = None, *, generation: bool = False) -> str | None:
        """Return what `text` returns, or None where the template refuses the conversation."""
        try:
            return self.text(messages, tools, generation=generation)
        except ChatError:
            return None

    def marked(self, messages: list[Message], tools: Tools = None) -> tuple[str, list[Span]]:
        """Return the text and the spans of characters inside of `{% generation %}` blocks.

        Raises:
            ChatError: the template refuses the conversation.
        """
        return self._render(messages, tools, mask=True)

    def _render(
        self, messages: list[Message], tools: Tools, *, mask: bool = False, generation: bool = False
    ) -> tuple[str, list[Span]]:
        render: Callable[..., tuple[list[str], list[list[Span]]]] = cast(Any, render_jinja_template)
        try:
            texts, spans = render(
                [name_tool_role(self._fields(messages), self.source)],
                tools=tools or None,
                chat_template=self.source,
                return_assistant_tokens_mask=mask,
                add_generation_prompt=generation,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatError(f"the chat template refuses the conversation: {error}") from error
        return texts[0], spans[0] if mask else []

    def _fields(self, messages: list[Message]) -> list[Message]:
        """Return the messages as the template needs them: without `train`, and with content as parts if required."""
        kept = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        return [_with_parts(message) for message in kept] if self.reads_parts else kept

    @cached_property
    def reads_parts(self) -> bool:
        """Return whether the template requires content as a list of parts, as some vision models' templates do."""
        self.__dict__["reads_parts"] = False  # used by the two renderings below
        asked = {"role": "user", "content": PROBE}
        plain, parts = self.attempt([asked]), self.attempt([_with_parts(asked)])
        return PROBE not in (plain or "") and PROBE in (parts or "")

    @cached_property
    def opening(self) -> str:
        """Return the text that the template adds for a reply, such as `<|im_start|>assistant`; often ''."""
        asked = [{"role": "user", "content": PROBE}]
        without, asking = self.attempt(asked) or "", self.attempt(asked, generation=True) or ""
        return asking[len(commonprefix([without, asking])) :]  # noqa: RUF071 (of texts, not of paths)

    @cached_property
    def turn_end(self) -> list[str]:
        """Return the tokens that the template writes after every answer, such as `<|im_end|>`.

        If the last answer ends with other tokens than an earlier one (gpt-oss: `<|return|>`, `<|end|>`), those of the
        last answer are returned, since generation stops with them. If it has none, the marker of the next message is
        returned: some families end an answer with it (GLM: `<|user|>`). Empty if no token follows an answer.
        """
        last, inner = self._run(self._answered()), self._run(self._answered(_OTHER))
        before, _, after = (self.attempt([_OTHER]) or "").partition(OTHER_PROBE)
        begins = {*self._next.findall(before)} - {*last[:1], *inner[:1], *self._run(after)[:1]}
        shared = takewhile(lambda pair: pair[0] == pair[1] not in begins, zip(last, inner, strict=False))
        return [token for token, _ in shared] or [token for token in last[:1] if token not in inner[1:]] or inner[:1]

    @cached_property
    def stops(self) -> list[str]:
        """Return the tokens at which generation must stop: `turn_end`, and a user marker directly after answers.

        A few templates end an earlier answer only with the user marker, and the last one with another token. If the
        template writes text before the first token, that token is returned.
        """
        if not self.turn_end:
            later = self._next.search(self._answered())
            return [] if later is None else [later.group(1)]
        marker = self._next.findall((self.attempt([_OTHER]) or "").partition(OTHER_PROBE)[0])[-1:]
        inner = self._run(self._answered(_OTHER))[:1]
        return list(dict.fromkeys([*self.turn_end, *(inner if inner == marker else [])]))

    def _answered(self, *more: Message) -> str:
        """Return the text after an answer's content."""
        asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        return (self.attempt([asked, answer, *more]) or "").partition(PROBE)[2]

    def _run(self, text: str) -> list[str]:
        """Return the tokens at the beginning of a text, up to the first other text."""
        found = list[str]()
        while match := self._next.match(text):
            found.append(match.group(1))
            text = text[match.end() :]
        return found

    def stops_at(self, text: str, end: int) -> bool:
        """Return whether the tokens of `turn_end` follow position `end` of a text, directly or after white space."""
        return bool(self.turn_end) and _sequence(self.turn_end).match(text, end) is not None

    def stopped(self, text: str, span: Span) -> tuple[Span, bool]:
        """Return an answer's characters with the stop token after it, and whether there is one.

        The span is extended over a token that follows it directly or after white space: the model must learn to write
        that token to stop.
        """
        begin = span[0]
        end = begin + len(self._body(text[begin : span[1]]))
        for count in range(len(self.turn_end), -1, -1) if self.turn_end else ():
            there, missing = self.turn_end[:count], self.turn_end[count:]
            found = _sequence(missing).match(text, end)
            if found is not None and re.search(_sequence(there).pattern + "$", text[begin:end]):
                return (begin, found.end()), True
        if self._ended.search(text[begin:end]):
            return (begin, end), True
        found = self._next.match(text, end)
        return ((begin, end), False) if found is None else ((begin, found.end()), True)

    def _body(self, said: str) -> str:
        """Return an answer without trailing white space and without tokens of the next message."""
        whole, last = said.rstrip(), self.turn_end[-1:]
        at = whole.rfind(last[0]) if last else -1
        end = at + len(last[0]) if at >= 0 else len(whole)
        return whole[:end] if not self._next.sub("", whole[end:]).strip() else whole


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the tokenizer's own chat template (of several, the one named `default`), or None if it has none."""
    own = tokenizer.chat_template
    source = own.get("default") if isinstance(own, dict) else own
    return ChatTemplate(tokenizer, source) if source else None


def _markers(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return the tokens that a template may write around messages, and whether each is special.

    A token that only begins texts is excluded. Added tokens that are not special count only if they look like markers:
    tokenizers also add line breaks, spaces and words of a domain.
    """
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    added |= dict.fromkeys(tokenizer.all_special_tokens, True)
    if tokenizer.bos_token != tokenizer.eos_token:
        added.pop(tokenizer.bos_token, None)
    return {text: special for text, special in added.items() if special or _MARKER.fullmatch(text)}


def _sequence(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("".join(rf"\s*{re.escape(token)}" for token in tokens))


def _any_of(texts: Iterable[str | None]) -> str:
    """Return a pattern that matches any of the texts, longer ones first."""
    longest_first = sorted(filter(None, texts), key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
