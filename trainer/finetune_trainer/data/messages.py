"""One normal form for the messages of a conversation, as OpenAI, ShareGPT, LLaMA-Factory and ms-swift write them.

A message is `{"role": str, "content": str}` and, where the row has them:

- `tool_calls`: the calls of an assistant's message, in the form of `tools`
- `train`: False on an assistant's message that carries no loss; absent on every other. It is for the loss masks alone:
  remove it (`without_train`) before a chat template sees the message.
- keys that templates may read, as they are: `name`, `tool_call_id`, `reasoning_content` and others

Nulls inside of any of these are removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from finetune_api.problems import did_you_mean, nearest
from finetune_trainer.data.json_values import FormError, kind_name, without_nulls
from finetune_trainer.data.loss_keys import bears_on_loss, carries_loss
from finetune_trainer.data.tools import parse_calls, read_calls

Message = dict[str, Any]
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SPEAKERS = {name: "user" for name in ("human", "user")}
SPEAKERS |= {name: "assistant" for name in ("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard", "claude")}
SPEAKERS |= {name: name for name in ("system", "developer", "function_call", "tool_call", "function")}
SPEAKERS |= {name: "tool" for name in ("tool", "observation", "function_response", "tool_response", "ipython")}
"""Roles by what ShareGPT's `from` calls them, in lower case and with underscores."""
SLIPS = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant")
"""What other tools call a role, in rows that have `role` and should have ours."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of a message whose content is the JSON of a call: LLaMA-Factory's and ms-swift's."""
TOOL_ROLES = ("tool", "ipython", "observation", "function", "tool_response")
"""What templates call the message that holds a tool's result."""
SLIP = 2
"""Letters that a slip adds or leaves out: `function_call` is a role of its own."""
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
_READ = {"role", "from", "content", "value", "tool_calls", "function_call"}


def read_messages(value: Any, name: str) -> list[Message]:
    """Return a list of messages in the normal form.

    A message of role `function_call` or `tool_call` becomes the assistant's `tool_calls`; several in a row, or one
    that follows the assistant's text, are one message.

    Args:
        name: what the list is called in errors, such as `messages`.

    Raises:
        FormError: a message has another form; the error names it, such as `messages[2].content`.
    """
    if not isinstance(value, list):
        raise FormError(f"`{name}` is {kind_name(value)}, expected a list of messages")
    messages: list[Message] = []
    for index, given in enumerate(value):
        message = _read(given, f"{name}[{index}]")
        if messages and _role_of(given) in CALL_ROLES and _can_take_calls(messages[-1], message):
            calls = [*messages[-1].get("tool_calls", []), *message["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
        else:
            messages.append(message)
    return messages


def answer_text(message: Message) -> str:
    """Return what a message says, as a reference: its content, else the JSON of its calls, one per line."""
    calls = [] if message["content"] else message.get("tool_calls", [])
    return message["content"] or "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)


def without_train(messages: Iterable[Message]) -> list[Message]:
    """Return the messages as a chat template may see them, without the mark of those that carry no loss."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def name_tool_role(messages: list[Message], template: str) -> list[Message]:
    """Return the messages with the results of tools under the role that a chat template names.

    Templates drop or print a role that they do not know. Llama 3 knows `ipython` and `tool`, GLM-4 `observation`, most
    others `tool` alone. A role that the template compares with stays, and all stay where it names none of them.
    """
    named = [role for role in TOOL_ROLES if _names(template, role)]
    if not named:
        return messages
    renamed = {role: named[0] for role in TOOL_ROLES if role not in named}
    return [{**message, "role": renamed.get(message["role"], message["role"])} for message in messages]


def _names(template: str, role: str) -> bool:
    """Whether a template names a role. `function` and `tool_response` are keys and marks in templates, too."""
    compared = r"role\W{0,4}\s*(?:(?:==|!=)\s*|in\s*[\[(][^\])]*)" if role in ("function", "tool_response") else ""
    return re.search(rf"{compared}[\"']{role}[\"']", template) is not None


def _can_take_calls(before: Message, message: Message) -> bool:
    return before["role"] == "assistant" and before.get("train") == message.get("train")


def _read(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise FormError(f"{where} is {kind_name(given)}, expected a message with `role` and `content`")
    role = _role(given, where)
    content = given["content"] if given.get("content") is not None else given.get("value")
    if role in CALL_ROLES:
        calls, role, content = parse_calls(content, f"{where}.{_content_key(given)}"), "assistant", ""
        if not calls:
            raise FormError(f"{where} is a call of a tool without content, expected the JSON of `{{name, arguments}}`")
    else:
        calls = read_calls(given, where)
        content = _text(content, role, bool(calls), given, where)
    loss = carries_loss(given, role, where)
    message = {"role": role, "content": content, **_others(given)}
    message |= {"tool_calls": calls} if calls else {}
    return message if loss or role != "assistant" else {**message, "train": False}


def _others(given: Message) -> Message:
    """The keys that templates may read, as they are."""
    rest = {key: value for key, value in given.items() if key not in _READ and not bears_on_loss(key)}
    cleaned: Message = without_nulls(rest) if rest else rest
    return cleaned


def _content_key(given: Message) -> str:
    return "content" if given.get("content") is not None or "value" not in given else "value"


def _role_of(given: Message) -> str | None:
    """The role as the row calls it; a ShareGPT speaker in lower case."""
    if given.get("role") is not None:
        return given["role"] if isinstance(given["role"], str) else None
    speaker = given.get("from")
    return str(speaker).lower().replace("-", "_").replace(" ", "_") if speaker is not None else None


def _role(given: Message, where: str) -> str:
    role = _role_of(given)
    if role is None and given.get("role") is not None:
        raise FormError(f"{where}: `role` and `content` must be strings")
    if role is None:
        raise FormError(f"{where} has {sorted(given)}, expected `role` and `content` (or `from` and `value`)")
    if given.get("role") is not None:
        _check_role(role, f"{where}.role")
        return role
    if role not in SPEAKERS:
        raise FormError(f"{where}.from is {given['from']!r}{did_you_mean(role, SPEAKERS)}")
    return _function_role(given) if SPEAKERS[role] == "function" else SPEAKERS[role]


def _function_role(given: Message) -> str:
    """`from: function` is a call where its value is one (LLaMA-Factory, before 2024), else a tool's result."""
    try:
        return "function_call" if parse_calls(given.get("value"), "value") else "tool"
    except FormError:
        return "tool"


def _check_role(role: str, where: str) -> None:
    """Refuse a slip in a role that every template has; a template's own roles are the template's to judge."""
    if role in KNOWN_ROLES:
        return
    meant = SLIPS.get(role.lower()) or nearest(role, KNOWN_ROLES)
    if meant is not None and (role.lower() in SLIPS or abs(len(meant) - len(role)) <= SLIP):
        raise FormError(f"{where} is {role!r}: did you mean `{meant}`?")


def _reasons(given: Message) -> bool:
    return any(given.get(key) for key in REASONING)


def _text(value: Any, role: str, calls: bool, given: Message, where: str) -> str:
    """The content as one string; a message with calls or reasoning needs none."""
    if isinstance(value, str):
        return value
    if value is None or value == []:
        return "" if calls or _reasons(given) else _no_text(given, where)
    if isinstance(value, list) and not (role in TOOL_ROLES and not any(_is_part(part) for part in value)):
        return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(value))
    if role in TOOL_ROLES and isinstance(value, dict | list | int | float):
        return json.dumps(without_nulls(value), ensure_ascii=False)
    raise FormError(f"{where}: `role` and `content` must be strings")


def _no_text(given: Message, where: str) -> NoReturn:
    if "content" not in given and "value" not in given:
        raise FormError(f"{where} has {sorted(given)}, expected `role` and `content`")
    raise FormError(f"{where}.{_content_key(given)} is empty (null): expected a string, text parts or `tool_calls`")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and "type" in part)


def _part(part: Any, where: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise FormError(f"{where} is {kind_name(part)}, expected a text part such as `{{type: text, text: Hi}}`")
    filled = without_nulls(part)
    kind = filled.get("type") or ("text" if "text" in filled else next(iter(filled), "empty"))
    if kind in TEXT_PARTS and isinstance(filled.get("text"), str):
        text: str = filled["text"]
        return text
    hint = "write its text as the message's `reasoning_content`" if kind in REASONING else "remove the part or the row"
    raise FormError(f"{where} is a part of type `{kind}`, and only text is trained on: {hint}")
