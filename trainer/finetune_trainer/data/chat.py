"""Conversations as tokens: rendered by the tokenizer's chat template, with the assistant's tokens known exactly."""

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
from finetune_trainer.data.template_messages import fitted

UNENDED = "answers that no stop token ends: the model does not learn to stop after them"
TOOLS_UNUSED = "`tools` that the chat template does not write"


@dataclass(frozen=True)
class Rendered:
    """A conversation's text."""

    text: str
    turns: tuple[tuple[int, Span], ...]
    """For each of the assistant's turns its place among the messages and the characters that the model writes."""
    notes: tuple[str, ...] = ()
    """What the user has to know about the conversation."""

    def spans(self, messages: list[Message], first: int = 0) -> list[Span]:
        """Return the characters that carry loss: the turns from message `first` on, but those with `train: false`."""
        return [span for place, span in self.turns if place >= first and messages[place].get("train") is not False]


@dataclass(frozen=True)
class Encoded:
    """Tokens with the characters of the text that they begin at, and a 0/1 mask of the trained ones."""

    ids: list[int]
    starts: list[int]
    mask: list[int]
    notes: tuple[str, ...] = ()
    prompt: int = 0
    """How many of the tokens are the prompt's, where prompt and answer are separate."""


class ChatFormat:
    """A tokenizer with the chat template that training uses.

    The template is the tokenizer's own where it marks assistant turns by `{% generation %}`, else TRL's training
    twin of it, else the tokenizer's own; `turns.find_turns` says how the turns are found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.template: ChatTemplate | None = template_of(tokenizer)
        self.marked = False
        if self.template is None:
            return
        from trl.chat_template_utils import has_generation_markers  # takes seconds to import, for dialogues alone

        if not has_generation_markers(self.template.source):
            twin = _training_twin(tokenizer)
            self.template = ChatTemplate(tokenizer, twin) if twin else self.template
        self.marked = has_generation_markers(self.template.source)

    def render(self, messages: list[Message], tools: Tools = None) -> Rendered:
        """Return a conversation's text, in which every assistant turn has its stop token where there is any.

        Raises:
            ChatError: the template refuses the conversation, or a turn can't be told from the rest of the text.
        """
        template = self._template()
        said = fitted(template, messages, tools)
        text, turns = find_turns(template, said, tools, self.marked)
        unused = [TOOLS_UNUSED] if tools and text == template.attempt(said) else []
        stopped = [template.stopped(text, turn.span) for turn in turns]
        spans, ends = [span for span, _ in stopped], [end for _, end in stopped]
        if turns and turns[-1].message == len(said) - 1:
            stop = "" if ends[-1] else "".join(template.turn_end) or template.eos or ""
            ends[-1] = ends[-1] or bool(stop)
            text, spans[-1] = _closed(text, spans[-1], stop)
            text, spans[-1] = with_thought(text, spans[-1], turns[-1].thought, said[-1])
        places = [turn.message for turn in turns]
        return Rendered(text, tuple(zip(places, spans, strict=True)), (*unused, *[UNENDED][: not all(ends)]))

    def prompt(self, messages: list[Message], tools: Tools = None) -> str:
        """Return the text that a reply to `messages` starts from; '' where there are no messages.

        Raises:
            ChatError: the template refuses the conversation.
        """
        template = self._template()
        return template.text(fitted(template, messages, tools), tools, generation=True) if messages else ""

    def conversation(self, messages: list[Message], tools: Tools = None) -> Encoded:
        """Return a conversation's tokens, of which the assistant's carry loss.

        Raises:
            ChatError: see `render`.
        """
        rendered = self.render(messages, tools)
        return self.encode(rendered.text, rendered.spans(messages), rendered.notes)

    def reply(self, prompt: list[Message], answer: list[Message], tools: Tools = None) -> Encoded:
        """Return the tokens of prompt and answer as one text, of which the answer's assistant turns carry loss.

        Raises:
            ChatError: see `render`.
        """
        whole = [*prompt, *answer]
        rendered = self.render(whole, tools)
        start = _start(rendered, self.prompt(prompt, tools), len(prompt))
        spans = [(max(begin, start), end) for begin, end in rendered.spans(whole, len(prompt))]
        return self.encode(rendered.text, spans, rendered.notes, start)

    def encode(self, text: str, spans: list[Span], notes: tuple[str, ...] = (), start: int = 0) -> Encoded:
        """Return the tokens of a rendered text; a token is trained where it begins inside a span.

        Args:
            start: the character that the answer starts at.
        """
        ids, starts = self._tokens(text, [begin for begin, _ in spans])
        return Encoded(ids, starts, mask_of(starts, spans), notes, bisect_left(starts, start))

    def _tokens(self, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
        """Return tokens and the characters that they begin at.

        What comes before and after a cut has its tokens apart, as a prompt at inference and the answer to it have:
        white space around a cut would else become other tokens. A tokenizer that puts a blank before every text can't
        do that.
        """
        ids, starts = list[int](), list[int]()
        for begin, end in pairwise([0, *(cuts if self._is_seamless else []), len(text)]):
            part = self.backend.encode(text[begin:end], add_special_tokens=False)
            ids += part.ids
            starts += [begin + at for at, _ in part.offsets]
        return ids, starts

    @cached_property
    def _is_seamless(self) -> bool:
        """Whether a text has the same tokens alone as after a line break."""
        alone, after = (self.backend.encode(text, add_special_tokens=False).ids for text in ("a", "\na"))
        return after[-len(alone) :] == alone

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise ChatError("the row is a conversation, but the tokenizer has no chat template")
        return self.template


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


def _closed(text: str, span: Span, stop: str) -> tuple[str, Span]:
    """Return a text whose last answer ends with a stop token, where `stop` is one that it lacks.

    Nothing of the template follows there but white space, which the model would not write before its stop token.
    """
    return (text[: span[1]] + stop, (span[0], span[1] + len(stop))) if stop else (text, span)


def _start(rendered: Rendered, opening: str, first: int) -> int:
    """Return the character that the answer starts at, whose messages are those from `first` on.

    Without a prompt that is where the first assistant turn begins: a default system message is no answer.
    """
    if opening and rendered.text.startswith(opening):
        return len(opening)
    begin = next((span[0] for place, span in rendered.turns if place >= first), len(rendered.text))
    return min(begin, len(commonprefix([rendered.text, opening]))) if opening else begin  # noqa: RUF071 (of texts)


def _training_twin(tokenizer: PreTrainedTokenizerFast) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        twin: str | None = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):
        return None
    return twin
