"""From prompts to token ids: the chat template where there is one, the bare text where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.form import Form

Message = dict[str, str]
Conversation = list[Message]
Prompt = str | Conversation
"""A text (with a chat template: one user message) or a conversation of `{role, content}` messages."""

_PROBE, _NEXT = "PROBE", "FOLLOWS"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    system: str | None = None,
    raw: bool | None = False,
    form: Form | None = None,
) -> list[list[int]]:
    """Return the token ids of each prompt, up to where the answer begins.

    Args:
        raw: true continues texts as they stand; false makes each a user's message, where there is a chat template;
            None asks in the form that the model was trained in. A conversation goes through the chat template then.
        form: how the model was trained; None where that is not known, which asks by the chat template.

    Raises:
        UserError: an empty prompt, or a conversation or system message without a chat template to write it in.
    """
    plain = form_is_plain(form) if raw is None else raw
    chats = [has_template(tokenizer) and not (plain and (raw or isinstance(prompt, str))) for prompt in prompts]
    problems = _chat_only(tokenizer, prompts, chats, system, raw)
    problems += [Problem(f"prompts[{index}]", "is empty") for index, prompt in enumerate(prompts) if not prompt]
    if problems:
        raise UserError(problems)
    return [
        _encode_chat(tokenizer, conversation(prompt, system)) if chat else encode_text(tokenizer, str(prompt))
        for prompt, chat in zip(prompts, chats, strict=True)
    ]


def form_is_plain(form: Form | None) -> bool:
    """Whether a model that was trained in this form is asked without the chat template."""
    return form in ("prompt-completion", "text")


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return a text's ids as training on plain text has them: the begin-of-text token first, where the tokenizer puts
    one, and no end-of-text token."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    lead = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    return ids if ids[:1] == lead else lead + ids


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how to write a conversation."""
    return bool(tokenizer.chat_template)


def conversation(prompt: Prompt, system: str | None) -> Conversation:
    """The prompt as messages, the system message first where the prompt has none."""
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
    turn_end = end_of_turn(tokenizer) if has_template(tokenizer) else None
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id, turn_end] if stop is not None})


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the chat template writes after an assistant's text, or None where it writes none.

    Nothing declares this token, so it is read from a rendered conversation: the first added token after the last
    answer or, where nothing follows the last answer (GLM), after an answer that a user's turn follows: the marker of
    that turn. Ordinary tokens don't count: an answer may contain them.
    """
    added = tokenizer.added_tokens_decoder
    for messages in _probes():
        after = _after_answer(tokenizer, messages)
        ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        found = next((int(token) for token in ids if token in added), None)
        if found is not None:
            return found
    return None


def _probes() -> Iterator[list[dict[str, Any]]]:
    """Conversations with a known answer, contents as strings and as the parts that some templates need."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        turns = [("user", "?"), ("assistant", _PROBE), ("user", _NEXT)]
        messages = [{"role": role, "content": content(text)} for role, text in turns]
        yield from (messages[:2], messages)


def _after_answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """Return what the template writes between the assistant's text and the next user's; empty where it refuses."""
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return ""
    _, found, after = rendered.rpartition(_PROBE)
    return after.partition(_NEXT)[0] if found else ""


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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
