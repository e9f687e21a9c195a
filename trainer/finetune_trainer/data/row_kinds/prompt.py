"""Prompts that a model answers: `{prompt, columns}`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune_trainer.data.json_values import EmptyRow, FormError
from finetune_trainer.data.messages import Message, answer_text, without_train
from finetune_trainer.data.prompt_boundary import put_system, split
from finetune_trainer.data.row_kinds import Columns, Example, RowKind, preference
from finetune_trainer.data.row_kinds.sft import conversation, plain_or_transcript, prompt_value

if TYPE_CHECKING:
    from finetune_trainer.data.columns import Fields
    from finetune_trainer.data.encode import Encoder
    from finetune_trainer.data.report import Stats

RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids", "image", "images"}
"""Column names that TRL sets itself or that have another meaning in its reward functions."""


def normalise(fields: Fields) -> Example:
    """Return the row as `{prompt, columns}`; an answer in the row becomes the column `reference`."""
    prompt, reference, templated = _prompt_and_reference(fields)
    if not prompt:
        raise EmptyRow("empty")
    names = {fields.column, *(getattr(fields.spec.columns, name) for name in ("prompt", "messages", "text"))}
    columns = {name: value for name, value in fields.row.items() if name not in names | RESERVED}
    if reference is not None:
        columns.setdefault("reference", reference)
    prompt = prompt if isinstance(prompt, str) else without_train(prompt)
    return {"prompt": prompt, "columns": columns, "templated": templated}


def _prompt_and_reference(fields: Fields) -> tuple[Any, Any, bool]:
    """Return the prompt, the answer in the row (None if it has none), and whether both are `templated`."""
    values = fields.values
    if "messages" in values and fields.column != fields.spec.columns.messages:
        return *_split_messages(conversation(fields)), False
    if "chosen" in values and "rejected" in values and "prompt" not in fields.texts:
        pair = preference.normalise(fields)
        return pair["prompt"], _reference(pair["chosen"]), bool(pair.get("templated"))
    if "prompt" in values:
        return _single_prompt(fields)
    if "text" in values and fields.spec.transcript is not None:
        return *_split_messages(plain_or_transcript(fields)["messages"]), False
    raise FormError(fields.not_there("prompt"))


def _single_prompt(fields: Fields) -> tuple[Any, Any, bool]:
    """Return `_prompt_and_reference` of a row that is not a pair.

    A string becomes a user message if its answer is a conversation or if `template` made it.
    """
    name = next((name for name in ("completion", "chosen") if fields.values.get(name)), "")
    reference, prompt = fields.values.get(name), prompt_value(fields)
    if isinstance(reference, list | dict):
        made = split(prompt, [fields.turns(name, "assistant")], fields.spec.columns.prompt)
        return put_system(fields.system, made.prompt), _reference(made.answers[0]), False
    if not isinstance(prompt, str):
        return put_system(fields.system, prompt or []), reference, "prompt" in fields.texts
    if "prompt" not in fields.texts and not fields.is_chat:
        return prompt, reference, False
    return put_system(fields.system, [{"role": "user", "content": prompt}]), reference, True


def _split_messages(messages: list[Message]) -> tuple[list[Message], Any]:
    """Return the messages before a final assistant message, and its text; else all messages and None."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], answer_text(messages[-1])
    return messages, None


def _reference(answer: Any) -> Any:
    """Return an answer's text: a string, or the text of the first assistant message of a list."""
    if isinstance(answer, str):
        return answer
    return next((answer_text(message) for message in answer if message["role"] == "assistant"), None)


def encode(encoder: Encoder, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
    """Yield `prompt_ids`, int32, and `row`, the JSON text of `prompt`, `columns` and, where there are any, `tools`."""
    (prompt,) = encoder.texts(example)
    tools = {"tools": example["tools"]} if example.get("tools") else {}
    ids = encoder.prompt_ids(prompt, **tools)
    stats.longest = max(stats.longest, len(ids))
    limit = encoder.encoding.limit
    if limit is not None and len(ids) > limit and not encoder.may_cut(number, len(ids), stats):
        return
    stats.kept += 1
    stats.tokens += len(ids)
    row = json.dumps({"prompt": prompt, "columns": example["columns"], **tools}, ensure_ascii=False)
    yield {"prompt_ids": np.array(ids, np.int32), "row": row}


KIND = RowKind(
    needed="`prompt`, `messages`, or `chosen` and `rejected`",
    normalise=normalise,
    encode=encode,
    pairs="yes",
    needs_answer=False,
    limit_field="maxPromptLength",
    rows="prompts",
    overflow_hint="Set overflow: drop",
)
