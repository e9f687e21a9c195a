"""A row as a question: what a model is asked, and what the data answers. Light: no tokenizer, no table."""

from __future__ import annotations

import re
from typing import Any

from finetune_trainer.data.messages import Message, answer_text, without_train
from finetune_trainer.data.row_formats import Example

PROMPT_WORDS = 32
Prompt = dict[str, Any]


def prompt_of(example: Example) -> Prompt | None:
    """Return a normalised row of any kind as a prompt; None where nothing is left to answer.

    It has `messages` (with `tools`, where the row has them) or `prompt` (plain text), and `reference`, what the row
    goes on with.
    """
    asked = _asked(example)
    if asked is None or "messages" not in asked or not example.get("tools"):
        return asked
    return {**asked, "tools": example["tools"]}


def _asked(example: Example) -> Prompt | None:
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
    """The last answer that carries loss, and all before it: one without loss is no model of an answer."""
    last = max((index for index, message in enumerate(messages) if _is_answer(message)), default=0)
    return {"messages": without_train(messages[:last]), "reference": answer_text(messages[last])} if last else None


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and "train" not in message


def has_reference(example: Example) -> bool:
    """Whether a row of dialogue says what the answer to it is; plain text does not."""
    return "text" not in example and prompt_of(example) is not None
