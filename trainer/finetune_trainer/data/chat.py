"""Tokenize conversations with the tokenizer's chat template and mask all but the assistant's tokens."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from os.path import commonprefix

import jinja2
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.assistant_spans import find_turns
from finetune_trainer.data.messages import Message
from finetune_trainer.data.reasoning import with_thought
from finetune_trainer.data.template import ChatError, ChatTemplate, Span, Tools, template_of
from finetune_trainer.data.template_messages import adapt_messages

UNENDED = "answers that no stop token ends: the model does not learn to stop after them"
TOOLS_UNUSED = "`tools` that the chat template does not write"


@dataclass(frozen=True)
class Rendered:
    """A conversation's text."""

    text: str
    turns: tuple[tuple[int, Span], ...]
    """For each of the assistant's turns, the index of its message and the characters that the model writes."""
    notes: tuple[str, ...] = ()
    """Warnings about the conversation for the user."""

    def spans(self, messages: list[Message], first: int = 0) -> list[Span]:
        """Return the characters that carry loss: the turns from message `first` on, without `train: false`."""
        return [span for index, span in self.turns if index >= first and messages[index].get("train") is not False]


@dataclass(frozen=True)
class Encoded:
    """Token ids, the text position at which each begins, and a 0/1 mask of the trained tokens."""

    ids: list[int]
    starts: list[int]
    mask: list[int]
    notes: tuple[str, ...] = ()
    prompt: int = 0
    """Number of tokens of the prompt, if prompt and answer are separate."""


class ChatFormat:
    """A tokenizer with the chat template that training uses.

    The template is the tokenizer's own if it marks assistant turns with `{% generation %}`, else TRL's training version
    of it, else the tokenizer's own. `assistant_spans` finds the turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.template: ChatTemplate | None = template_of(tokenizer)
        self.marked = False
        if self.template is None:
            return
        from trl.chat_template_utils import has_generation_markers  # takes seconds to import

        if not has_generation_markers(self.template.source):
            training_template = _training_template(tokenizer)
            self.template = ChatTemplate(tokenizer, training_template) if training_template else self.template
        self.marked = has_generation_markers(self.template.source)

    def render(self, messages: list[Message], tools: Tools = None) -> Rendered:
        """Return a conversation's text, in which every assistant turn has its stop token if there is one.

        Raises:
            ChatError: the template refuses the conversation, or a turn can't be separated from the rest of the text.
        """
        template = self._template()
        said = adapt_messages(template, messages, tools)
        text, turns = find_turns(template, said, tools, self.marked)
        unused = [TOOLS_UNUSED] if tools and text == template.attempt(said) else []
        stopped = [template.stopped(text, turn.span) for turn in turns]
        spans, ends = [span for span, _ in stopped], [end for _, end in stopped]
        if turns and turns[-1].message == len(said) - 1:
            stop = "" if ends[-1] else "".join(template.turn_end) or template.eos or ""
            ends[-1] = ends[-1] or bool(stop)
            text, spans[-1] = _closed(text, spans[-1], stop)
            text, spans[-1] = with_thought(text, spans[-1], turns[-1].thought, said[-1])
        indices = [turn.message for turn in turns]
        return Rendered(text, tuple(zip(indices, spans, strict=True)), (*unused, *[UNENDED][: not all(ends)]))

    def prompt(self, messages: list[Message], tools: Tools = None) -> str:
        """Return the prompt for a reply to `messages`; '' if there are no messages.

        Raises:
            ChatError: the template refuses the conversation.
        """
        template = self._template()
        return template.text(adapt_messages(template, messages, tools), tools, generation=True) if messages else ""

    def conversation(self, messages: list[Message], tools: Tools = None) -> Encoded:
        """Return a conversation's tokens; the assistant's tokens carry loss.

        Raises:
            ChatError: see `render`.
        """
        rendered = self.render(messages, tools)
        return self.encode(rendered.text, rendered.spans(messages), rendered.notes)

    def reply(self, prompt: list[Message], answer: list[Message], tools: Tools = None) -> Encoded:
        """Return the tokens of prompt and answer as one text; the answer's assistant turns carry loss.

        Raises:
            ChatError: see `render`.
        """
        whole = [*prompt, *answer]
        rendered = self.render(whole, tools)
        start = _answer_start(rendered, self.prompt(prompt, tools), len(prompt))
        spans = [(max(begin, start), end) for begin, end in rendered.spans(whole, len(prompt))]
        return self.encode(rendered.text, spans, rendered.notes, start)

    def encode(self, text: str, spans: list[Span], notes: tuple[str, ...] = (), start: int = 0) -> Encoded:
        """Return the tokens of a rendered text; a token is trained if it begins inside a span.

        Args:
            start: the character at which the answer starts.
        """
        ids, starts = self._tokens(text, [begin for begin, _ in spans])
        return Encoded(ids, starts, mask_of(starts, spans), notes, bisect_left(starts, start))

    def _tokens(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Return tokens and the character at which each begins.

        The text before and after a cut is tokenized separately, as prompt and answer are at inference: otherwise white
        space around a cut could become other tokens. A tokenizer that adds a space before every text is not cut.
        """
        ids, starts = list[int](), list[int]()
        for begin, end in pairwise([0, *(cuts if self._is_seamless else []), len(text)]):
            part = self.backend.encode(text[begin:end], add_special_tokens=False)
            ids += part.ids
            starts += [begin + at for at, _ in part.offsets]
        return ids, starts

    @cached_property
    def _is_seamless(self) -> bool:
        """Return whether a text has the same tokens alone as after a line break."""
        alone, after = (self.backend.encode(text, add_special_tokens=False).ids for text in ("a", "\na"))
        return after[-len(alone) :] == alone

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ChatError("the row is a conversation, but the tokenizer has no chat template")
        return self.template


def mask_of(starts: list[int], spans: list[Span]) -> list[int]:
    """Return a mask with 1 for each token that begins inside a span. Both lists ascend."""
    mask = [0] * len(starts)
    token = 0
    for begin, end in spans:
        while token < len(starts) and starts[token] < begin:
            token += 1
        while token < len(starts) and starts[token] < end:
            mask[token] = 1
            token += 1
    return mask


def _closed(text: str, span: Span, stop: str) -> tuple[str, Span]:
    """Return the text with a stop token after its last answer; '' adds none.

    The template only writes white space there, which the model would not write before its stop token.
    """
    return (text[: span[1]] + stop, (span[0], span[1] + len(stop))) if stop else (text, span)


def _answer_start(rendered: Rendered, opening: str, first: int) -> int:
    """Return the character at which the answer starts, which consists of the messages from `first` on.

    Without a prompt the answer starts with the first assistant turn: a default system message is not an answer.
    """
    if opening and rendered.text.startswith(opening):
        return len(opening)
    begin = next((span[0] for index, span in rendered.turns if index >= first), len(rendered.text))
    return min(begin, len(commonprefix([rendered.text, opening]))) if opening else begin  # noqa: RUF071 (of texts)


def _training_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        training_template: str | None = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):
        return None
    return training_template
