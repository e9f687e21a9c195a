"""Encode prompts as token ids, with the chat template if the tokenizer has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from finetune_api.problems import Problem
from finetune_trainer.data.plain_text import PlainFrame
from finetune_trainer.data.row_formats import Message
from finetune_trainer.data.template import ChatError, ChatTemplate, Tools, template_of
from finetune_trainer.data.template_messages import adapt_messages
from finetune_trainer.errors import UserError
from finetune_trainer.form import Form

Conversation = list[Message]
Prompt = str | Conversation
"""A text (with a chat template: one user message) or a conversation of `{role, content}` messages."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system: str | None = None,
    raw: bool | None = False,
    form: Form | None = None,
    tools: Tools = None,
) -> list[list[int]]:
    """Return the token ids of each prompt up to the start of the answer, the same as in training.

    Args:
        raw: true continues texts without the chat template; false makes each text a user message if there is a chat
            template; None uses the format of the training data for texts, and the chat template for conversations.
        form: format of the training data; None if it is not known: texts then use the chat template.
        tools: JSON schemas of the tools in the conversations.

    Raises:
        UserError: an empty prompt, a conversation that the chat template rejects, or a conversation or system message
            without a chat template.
    """
    template = template_of(tokenizer)
    plain = form_is_plain(form) if raw is None else raw
    chats = [template is not None and not (plain and (raw or isinstance(prompt, str))) for prompt in prompts]
    problems = _chat_only(tokenizer, prompts, chats, system, raw)
    problems += [Problem(f"prompts[{index}]", "is empty") for index, prompt in enumerate(prompts) if not prompt]
    if problems:
        raise UserError(problems)
    frame = PlainFrame(tokenizer)
    return [
        _ids(tokenizer, _chat_text(template, conversation(prompt, system), tools, at))
        if chat and template is not None
        else frame.opened(_ids(tokenizer, str(prompt)))
        for at, (prompt, chat) in enumerate(zip(prompts, chats, strict=True))
    ]


def form_is_plain(form: Form | None) -> bool:
    """Return whether prompts of a model trained on this format are used without the chat template."""
    return form in ("prompt-completion", "text")


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def conversation(prompt: Prompt, system: str | None) -> Conversation:
    """Return the prompt as messages, with the system message added if the prompt has none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def stop_ids(tokenizer: PreTrainedTokenizerBase, model_stops: int | list[int] | None) -> list[int]:
    """Return the ids of the tokens that end an answer: the end of text and, with a chat template, the end of a turn.

    Args:
        model_stops: `eos_token_id` of the model's generation config.
    """
    stops = model_stops if isinstance(model_stops, list) else [model_stops]
    template = template_of(tokenizer)
    ends = [] if template is None else [cast(int, tokenizer.convert_tokens_to_ids(end)) for end in template.stops]
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id, *ends] if stop is not None})


def _chat_text(template: ChatTemplate, messages: Conversation, tools: Tools, at: int) -> str:
    try:
        return template.text(adapt_messages(template, messages, tools), tools, generation=True)
    except ChatError as error:
        raise UserError([Problem(f"prompts[{at}]", str(error))]) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _chat_only(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chats: Sequence[bool],
    system: str | None,
    raw: bool | None,
) -> list[Problem]:
    why = "the tokenizer has no chat template"
    if has_template(tokenizer):
        why = "raw continues plain text" if raw else "the model was trained on plain text (--chat asks in chats)"
    problems = [Problem("system", f"needs a chat, but {why}")] if system and not all(chats) else []
    wrong = (index for index, chat in enumerate(chats) if not chat and not isinstance(prompts[index], str))
    return problems + [Problem(f"prompts[{index}]", f"is a conversation, but {why}") for index in wrong]
