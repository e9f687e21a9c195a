"""Adapt messages to a chat template: families differ in how they read tool calls and reasoning."""

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


def adapt_messages(template: ChatTemplate, messages: list[Message], tools: Tools = None) -> list[Message]:
    """Return the messages in the form in which the template writes their whole content.

    - A stop token at an answer's end and a begin-of-text token at the start are removed: the template writes them.
    - Arguments of tool calls are objects, or JSON strings if the template concatenates them with text (DeepSeek).
    - Empty content with tool calls becomes null if the template otherwise drops the calls (DeepSeek-R1).
    - A thought in the content moves to `reasoning_content` if the template otherwise writes two (Qwen3.8).

    Raises:
        ChatError: in every form, the template refuses the messages or drops tool calls or their results.
    """
    adapted = _without_spelled(template, messages)
    if any(_END in _content(message) for message in adapted):
        adapted = _with_thoughts(template, adapted, tools)
    if any(message.get("tool_calls") or message["role"] in TOOL_ROLES for message in adapted):
        adapted = _with_calls(template, adapted, tools)
    return adapted


def is_written_in(text: str, content: str) -> bool:
    """Return whether a text has the longest word of a content, or the whole content if it has no words.

    Templates strip, escape or indent contents, so the text may not contain a content as a whole.
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
    moved = [_with_reasoning_moved(message) for message in messages]
    plain, other = template.attempt(messages, tools), template.attempt(moved, tools)
    if plain is None or other is None or other.count(_END) >= plain.count(_END):
        return messages
    thoughts = [message["reasoning_content"] for message in moved if "reasoning_content" in message]
    return moved if all(is_written_in(other, thought) for thought in thoughts) else messages


def _with_reasoning_moved(message: Message) -> Message:
    found = _THOUGHT.fullmatch(_content(message)) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content"):
        return message
    return {**message, "reasoning_content": found.group(1).strip("\n"), "content": found.group(2).lstrip("\n")}


def _with_calls(template: ChatTemplate, messages: list[Message], tools: Tools) -> list[Message]:
    forms: list[list[Callable[[Message], Message]]] = [[], [_null_content], [_string_arguments]]
    forms.append([_null_content, _string_arguments])
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
        without = template.attempt(shaped) if tools else None  # the list of tools has the names, too
        missing = _missing(text if without is None else without, messages)
        if missing is None:
            return shaped
        lost = lost or missing
    raise refused if refused is not None and lost is None else ChatError(str(lost))


def _null_content(message: Message) -> Message:
    return {**message, "content": None} if message.get("tool_calls") and not message.get("content") else message


def _string_arguments(message: Message) -> Message:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_as_string(call) for call in calls]} if calls else message


def _as_string(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _as_string(call["function"])}
    arguments = call.get("arguments")
    return call if isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _missing(text: str, messages: list[Message]) -> str | None:
    """Return why a text lacks content of the messages, or None."""
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            if str(function.get("name")) not in text or not _has_keys(text, function.get("arguments")):
                return "the chat template does not write tool calls: use a tokenizer whose template does"
            if _is_garbled(text, function.get("arguments")):
                return "the chat template writes the arguments of tool calls neither from objects nor from JSON"
        if message["role"] in TOOL_ROLES and not is_written_in(text, _content(message)):
            return "the chat template does not write the results of tools: use a tokenizer whose template does"
    return None


def _has_keys(text: str, arguments: Any) -> bool:
    return not isinstance(arguments, dict) or all(str(key) in text for key in arguments)


def _is_garbled(text: str, arguments: Any) -> bool:
    """Return whether the text has the arguments as a Python repr or as JSON that was encoded twice."""
    if not isinstance(arguments, dict) or not arguments:
        return False
    once = json.dumps(arguments, ensure_ascii=False)
    twice = json.dumps(once, ensure_ascii=False)[1:-1]
    return twice in text or (repr(arguments) != once and repr(arguments) in text)
