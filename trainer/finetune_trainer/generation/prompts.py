"""From prompts to token ids: the chat template where there is one, the bare text where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError

Message = dict[str, str]
Conversation = list[Message]
Prompt = str | Conversation
"""A text (with a chat template: one user message) or a conversation of `{role, content}` messages."""

_PROBE = "PROBE"


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


def stop_ids(tokenizer: PreTrainedTokenizerBase, model_stops: int | list[int] | None, raw: bool = False) -> list[int]:
    """Tokens that end an answer: the end of text and, in a chat, the end of a turn.

    Template authors mark the end of a turn as they like, so it is read from a rendered conversation.
    """
    stops = model_stops if isinstance(model_stops, list) else [model_stops]
    turn_end = None if raw or not has_template(tokenizer) else _end_of_turn(tokenizer)
    return sorted({stop for stop in [*stops, tokenizer.eos_token_id, turn_end] if stop is not None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    rest = tokenizer(rendered.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    return int(rest[0]) if rest and rest[0] in tokenizer.all_special_ids else None


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _chat_only(prompts: Sequence[Prompt], system: str | None, raw: bool) -> list[Problem]:
    why = "raw continues plain text" if raw else "the tokenizer has no chat template"
    problems = [Problem("system", f"needs a chat, but {why}")] if system else []
    conversations = (index for index, prompt in enumerate(prompts) if not isinstance(prompt, str))
    return problems + [Problem(f"prompts[{index}]", f"is a conversation, but {why}") for index in conversations]
