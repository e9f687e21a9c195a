"""From prompts to token ids: the chat template where there is one, the bare text where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from finetune_api.problems import Problem
from finetune_trainer.data.fitting import fitted
from finetune_trainer.data.forms import Message
from finetune_trainer.data.plain import PlainFrame
from finetune_trainer.data.template import ChatError, ChatTemplate, Tools, template_of
from finetune_trainer.errors import UserError

Conversation = list[Message]
Prompt = str | Conversation
"""A text (with a chat template: one user message) or a conversation of `{role, content}` messages."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system: str | None = None,
    raw: bool = False,
    tools: Tools = None,
) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins, the same as training has them.

    Args:
        tools: JSON schemas of the tools that the conversations offer.

    Raises:
        UserError: an empty prompt, a conversation that the chat template refuses, or a conversation or system message
            without a chat template to write it in.
    """
    template = None if raw else template_of(tokenizer)
    problems = [] if template is not None else _chat_only(prompts, system, raw)
    problems += [Problem(f"prompts[{index}]", "is empty") for index, prompt in enumerate(prompts) if not prompt]
    if problems:
        raise UserError(problems)
    if template is None:
        frame = PlainFrame(tokenizer)
        return [frame.opened(_ids(tokenizer, str(prompt))) for prompt in prompts]
    texts = [_chat_text(template, conversation(prompt, system), tools, at) for at, prompt in enumerate(prompts)]
    return [_ids(tokenizer, text) for text in texts]


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how to write a conversation."""
    return bool(tokenizer.chat_template)


def conversation(prompt: Prompt, system: str | None) -> Conversation:
    """The prompt as messages, the system message first where the prompt has none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def stop_ids(tokenizer: PreTrainedTokenizerBase, model_stops: int | list[int] | None, raw: bool = False) -> list[int]:
    """Tokens that end an answer: the end of text and, in a chat, the end of a turn as the chat template writes it."""
    stops = model_stops if isinstance(model_stops, list) else [model_stops]
    template = None if raw else template_of(tokenizer)
    ends = [] if template is None else [cast(int, tokenizer.convert_tokens_to_ids(end)) for end in template.stops]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id, *ends] if stop is not None})


def _chat_text(template: ChatTemplate, messages: Conversation, tools: Tools, at: int) -> str:
    try:
        return template.text(fitted(template, messages, tools), tools, generation=True)
    except ChatError as error:
        raise UserError([Problem(f"prompts[{at}]", str(error))]) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _chat_only(prompts: Sequence[Prompt], system: str | None, raw: bool) -> list[Problem]:
    why = "raw continues plain text" if raw else "the tokenizer has no chat template"
    problems = [Problem("system", f"needs a chat, but {why}")] if system else []
    conversations = (index for index, prompt in enumerate(prompts) if not isinstance(prompt, str))
    return problems + [Problem(f"prompts[{index}]", f"is a conversation, but {why}") for index in conversations]
