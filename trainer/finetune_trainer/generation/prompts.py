"""From prompts to token ids: the chat template where there is one, the bare text where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError

Message = dict[str, str]
Conversation = list[Message]
Prompt = str | Conversation
"""A text (with a chat template: one user message) or a conversation of `{role, content}` messages."""

_PROBE, _NEXT = "PROBE", "FOLLOWS"


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], system: str | None = None, raw: bool = False
) -> list[list[int]]:
    """Token ids of each prompt, up to where the answer begins.

    Raises:
        UserError: an empty prompt, or a conversation or system message without a chat template to write it in.
    """
    chat = not raw and has_template(tokenizer)
    problems = [] if chat else _chat_only(prompts, system, raw)
    problems += [Problem(f"prompts[{index}]", "is empty") for index, prompt in enumerate(prompts) if not prompt]
    if problems:
        raise UserError(problems)
    if not chat:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [_encode_chat(tokenizer, conversation(prompt, system)) for prompt in prompts]


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


def _chat_only(prompts: Sequence[Prompt], system: str | None, raw: bool) -> list[Problem]:
    why = "raw continues plain text" if raw else "the tokenizer has no chat template"
    problems = [Problem("system", f"needs a chat, but {why}")] if system else []
    conversations = (index for index, prompt in enumerate(prompts) if not isinstance(prompt, str))
    return problems + [Problem(f"prompts[{index}]", f"is a conversation, but {why}") for index in conversations]
