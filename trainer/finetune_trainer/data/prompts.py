"""Convert a row to a prompt with a reference answer. This module imports no slow libraries."""

from __future__ import annotations

import re
from typing import Any

from finetune_trainer.data.messages import Message, answer_text, without_train
from finetune_trainer.data.row_formats import Example

PROMPT_WORDS = 32
Prompt = dict[str, Any]


def prompt_of(example: Example) -> Prompt | None:
    """Return a row of any kind as a prompt; None if there is nothing to answer.

    The prompt has `messages` (with `tools`, if the row has them) or `prompt` (plain text), and `reference`, the row's
    continuation.
    """
    prompt = _without_tools(example)
    if prompt is None or "messages" not in prompt or not example.get("tools"):
        return prompt
    return {**prompt, "tools": example["tools"]}


def _without_tools(example: Example) -> Prompt | None:
    if "columns" in example:
        name = "prompt" if isinstance(example["prompt"], str) else "messages"
        return {name: example["prompt"], "reference": example["columns"].get("reference")}
    if "text" in example:
        words = list(re.finditer(r"\S+", example["text"]))
        end = words[min(len(words) // 2, PROMPT_WORDS) - 1].end() if len(words) > 1 else len(example["text"])
        return {"prompt": example["text"][:end], "reference": example["text"][end:]}
    if "messages" in example:
        return _last_turn(example["messages"])
    answer = example["chosen" if "chosen" in example else "completion"]
    if isinstance(answer, str):
        return {"prompt": example["prompt"], "reference": answer}
    at = next((index for index, message in enumerate(answer) if _is_answer(message)), None)
    if at is None:
        return None
    return {"messages": without_train(example["prompt"] + answer[:at]), "reference": answer_text(answer[at])}


def _last_turn(messages: list[Message]) -> Prompt | None:
    """Return the messages before the last answer that carries loss, and that answer as reference."""
    last = max((index for index, message in enumerate(messages) if _is_answer(message)), default=0)
    return {"messages": without_train(messages[:last]), "reference": answer_text(messages[last])} if last else None


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and "train" not in message


def has_reference(example: Example) -> bool:
    """Return whether a dialogue row has a reference answer; plain text has none."""
    return "text" not in example and prompt_of(example) is not None
