"""Messages in the form that a chat template writes in full: families differ in how they read calls and thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from finetune_trainer.data.messages import TOOL_ROLES, Message
from finetune_trainer.data.template import ChatError, ChatTemplate, Tools

_WORD = re.compile(r"\w+")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_END = "</think>"


def fitted(template: ChatTemplate, messages: list[Message], tools: Tools = None) -> list[Message]:
    """Return the messages in the form in which the template writes all that they say.

    - A stop token at an answer's end and a begin-of-text token at the start are left out: the template writes them.
    - Arguments of tool calls are objects; where the template joins them to text (DeepSeek), they are JSON strings.
    - Empty content beside tool calls is null where the template else leaves the calls out (DeepSeek-R1).
    - A thought inside the content moves to `reasoning_content` where the template else writes two (Qwen3.8).

    Raises:
        ChatError: the template refuses the messages or leaves out tool calls or their results in every form.
    """
    said = _without_spelled(template, messages)
    if any(_END in _content(message) for message in said):
        said = _with_thoughts(template, said, tools)
    if any(message.get("tool_calls") or message["role"] in TOOL_ROLES for message in said):
        said = _with_calls(template, said, tools)
    return said


def traced(text: str, content: str) -> bool:
    """Whether a text has the longest word of a content, or all of a content without words.

    Templates strip, escape or indent contents, so that a content as a whole need not be in the text.
    """
    return max(_WORD.findall(content), key=len, default=content.strip()) in text


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _without_spelled(template: ChatTemplate, messages: list[Message]) -> list[Message]:
    ends = tuple(filter(None, (template.eos, "".join(template.turn_end))))
    clean = [_without_end(message, ends) if message["role"] == "assistant" else message for message in messages]
    if clean and template.bos and _content(clean[0]).startswith(template.bos):
        clean[0] = {**clean[0], "content": clean[0]["content"].removeprefix(template.bos)}
    return clean


def _without_end(message: Message, ends: tuple[str, ...]) -> Message:
    content = _content(message).rstrip()
    end = next((end for end in ends if content.endswith(end)), None)
    return message if end is None else {**message, "content": content.removesuffix(end)}


def _with_thoughts(template: ChatTemplate, messages: list[Message], tools: Tools) -> list[Message]:
    moved = [_moved(message) for message in messages]
    plain, other = template.attempt(messages, tools), template.attempt(moved, tools)
    if plain is None or other is None or other.count(_END) >= plain.count(_END):
        return messages
    thoughts = [message["reasoning_content"] for message in moved if "reasoning_content" in message]
    return moved if all(traced(other, thought) for thought in thoughts) else messages


def _moved(message: Message) -> Message:
    found = _THOUGHT.fullmatch(_content(message)) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "reasoning_content": found.group(1).strip("\n"), "content": found.group(2).lstrip("\n")}


def _with_calls(template: ChatTemplate, messages: list[Message], tools: Tools) -> list[Message]:
    forms: list[list[Callable[[Message], Message]]] = [[], [_null], [_strings], [_null, _strings]]
    refused: ChatError | None = None
    lost: str | None = None
    for form in forms:
        shaped = messages
        for change in form:
            shaped = [change(message) for message in shaped]
        try:
            text = template.text(shaped, tools)
        except ChatError as error:
            refused = refused or error
            continue
        without = template.attempt(shaped) if tools else None  # names stand in the list of tools, too
        missing = _missing(text if without is None else without, messages)
        if missing is None:
            return shaped
        lost = lost or missing
    raise refused if refused is not None and lost is None else ChatError(str(lost))


def _null(message: Message) -> Message:
    return {**message, "content": None} if message.get("tool_calls") and not message.get("content") else message


def _strings(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_as_string(call) for call in calls]} if calls else message


def _as_string(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _as_string(call["function"])}
    arguments = call.get("arguments")
    return call if isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _missing(text: str, messages: list[Message]) -> str | None:
    """Return why a text does not say what the messages say, or None where it does."""
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            if str(function.get("name")) not in text or not _has_keys(text, function.get("arguments")):
                return "the chat template does not write tool calls: use a tokenizer whose template does"
            if _is_garbled(text, function.get("arguments")):
                return "the chat template writes the arguments of tool calls neither from objects nor from JSON"
        if message["role"] in TOOL_ROLES and not traced(text, _content(message)):
            return "the chat template does not write the results of tools: use a tokenizer whose template does"
    return None


def _has_keys(text: str, arguments: Any) -> bool:
    return not isinstance(arguments, dict) or all(str(key) in text for key in arguments)


def _is_garbled(text: str, arguments: Any) -> bool:
    """Whether arguments are in the text as Python writes them, or as JSON that was encoded a second time."""
    if not isinstance(arguments, dict) or not arguments:
        return False
    once = json.dumps(arguments, ensure_ascii=False)
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    return twice in text or (repr(arguments) != once and repr(arguments) in text)
