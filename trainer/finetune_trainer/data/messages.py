"""Normalize the messages of a conversation from the formats of OpenAI, ShareGPT, LLaMA-Factory and ms-swift.

A normalized message is `{"role": str, "content": str}` and, if the row has them:

- `tool_calls`: the calls of an assistant's message, in the format of `tools`
- `train`: False on an assistant's message that carries no loss; absent on every other. It is only for the loss masks:
  remove it (`without_train`) before passing the message to a chat template.
- other keys that templates may read, unchanged: `name`, `tool_call_id`, `reasoning_content` and others

Nulls inside of any of these are removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from finetune_api.problems import did_you_mean, nearest
from finetune_trainer.data.json_values import FormError, kind_name, without_nulls
from finetune_trainer.data.loss_keys import affects_loss, carries_loss
from finetune_trainer.data.tools import parse_calls, read_calls

Message = dict[str, Any]
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SPEAKERS = {name: "user" for name in ("human", "user")}
SPEAKERS |= {name: "assistant" for name in ("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard", "claude")}
SPEAKERS |= {name: name for name in ("system", "developer", "function_call", "tool_call", "function")}
SPEAKERS |= {name: "tool" for name in ("tool", "observation", "function_response", "tool_response", "ipython")}
"""Roles by their names in ShareGPT's `from`, in lower case and with underscores."""
MISTAKEN_ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant")
"""Role names of other tools that appear in `role` by mistake."""
CALL_ROLES = ("function_call", "tool_call")
"""Roles of a message whose content is the JSON of a call, in LLaMA-Factory and ms-swift."""
TOOL_ROLES = ("tool", "ipython", "observation", "function", "tool_response")
"""Names that templates use for the role of a tool's result."""
MAX_EDIT = 2
"""Maximum difference in length of a misspelled role: `function_call` is a different role than `function`."""
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
_READ = {"role", "from", "content", "value", "tool_calls", "function_call"}


def read_messages(value: Any, name: str) -> list[Message]:
    """Return a list of normalized messages.

    A message of role `function_call` or `tool_call` becomes the assistant's `tool_calls`; consecutive ones, or one
    after the assistant's text, are merged into one message.

    Args:
        name: name of the list in errors, such as `messages`.

    Raises:
        FormError: a message has an unknown format; the error names its path, such as `messages[2].content`.
    """
    if not isinstance(value, list):
        raise FormError(f"`{name}` is {kind_name(value)}, expected a list of messages")
    messages: list[Message] = []
    for index, raw in enumerate(value):
        message = _normalize(raw, f"{name}[{index}]")
        if messages and _role_of(raw) in CALL_ROLES and _can_take_calls(messages[-1], message):
            calls = [*messages[-1].get("tool_calls", []), *message["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
        else:
            messages.append(message)
    return messages


def answer_text(message: Message) -> str:
    """Return a message as a reference text: its content, else the JSON of its calls, one per line."""
    calls = [] if message["content"] else message.get("tool_calls", [])
    return message["content"] or "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in calls)


def without_train(messages: Iterable[Message]) -> list[Message]:
    """Return the messages without the key `train`, as a chat template needs them."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def name_tool_role(messages: list[Message], template: str) -> list[Message]:
    """Return the messages with tool results under a role that the chat template supports.

    Templates drop or print an unknown role. Llama 3 supports `ipython` and `tool`, GLM-4 `observation`, most others
    only `tool`. A role that the template names is kept, and all roles are kept if it names none of them.
    """
    named = [role for role in TOOL_ROLES if _names(template, role)]
    if not named:
        return messages
    renamed = {role: named[0] for role in TOOL_ROLES if role not in named}
    return [{**message, "role": renamed.get(message["role"], message["role"])} for message in messages]


def _names(template: str, role: str) -> bool:
    """Return whether a template names a role. `function` and `tool_response` are also keys and markers in templates."""
    compared = r"role\W{0,4}\s*(?:(?:==|!=)\s*|in\s*[\[(][^\])]*)" if role in ("function", "tool_response") else ""
    return re.search(rf"{compared}[\"']{role}[\"']", template) is not None


def _can_take_calls(before: Message, message: Message) -> bool:
    return before["role"] == "assistant" and before.get("train") == message.get("train")


def _normalize(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise FormError(f"{where} is {kind_name(raw)}, expected a message with `role` and `content`")
    role = _role(raw, where)
    content = raw["content"] if raw.get("content") is not None else raw.get("value")
    if role in CALL_ROLES:
        calls, role, content = parse_calls(content, f"{where}.{_content_key(raw)}"), "assistant", ""
        if not calls:
            raise FormError(f"{where} is a call of a tool without content, expected the JSON of `{{name, arguments}}`")
    else:
        calls = read_calls(raw, where)
        content = _text(content, role, bool(calls), raw, where)
    loss = carries_loss(raw, role, where)
    message = {"role": role, "content": content, **_others(raw)}
    message |= {"tool_calls": calls} if calls else {}
    return message if loss or role != "assistant" else {**message, "train": False}


def _others(raw: Message) -> Message:
    """Return the other keys, which templates may read."""
    rest = {key: value for key, value in raw.items() if key not in _READ and not affects_loss(key)}
    cleaned: Message = without_nulls(rest) if rest else rest
    return cleaned


def _content_key(raw: Message) -> str:
    return "content" if raw.get("content") is not None or "value" not in raw else "value"


def _role_of(raw: Message) -> str | None:
    """Return the row's role; a ShareGPT speaker in lower case."""
    if raw.get("role") is not None:
        return raw["role"] if isinstance(raw["role"], str) else None
    speaker = raw.get("from")
    return str(speaker).lower().replace("-", "_").replace(" ", "_") if speaker is not None else None


def _role(raw: Message, where: str) -> str:
    role = _role_of(raw)
    if role is None and raw.get("role") is not None:
        raise FormError(f"{where}: `role` and `content` must be strings")
    if role is None:
        raise FormError(f"{where} has {sorted(raw)}, expected `role` and `content` (or `from` and `value`)")
    if raw.get("role") is not None:
        _check_role(role, f"{where}.role")
        return role
    if role not in SPEAKERS:
        raise FormError(f"{where}.from is {raw['from']!r}{did_you_mean(role, SPEAKERS)}")
    return _function_role(raw) if SPEAKERS[role] == "function" else SPEAKERS[role]


def _function_role(raw: Message) -> str:
    """Return the role of `from: function`: a call if its value is one (LLaMA-Factory before 2024), else a result."""
    try:
        return "function_call" if parse_calls(raw.get("value"), "value") else "tool"
    except FormError:
        return "tool"


def _check_role(role: str, where: str) -> None:
    """Refuse a misspelled standard role. Other unknown roles are left to the template."""
    if role in KNOWN_ROLES:
        return
    meant = MISTAKEN_ROLES.get(role.lower()) or nearest(role, KNOWN_ROLES)
    if meant is not None and (role.lower() in MISTAKEN_ROLES or abs(len(meant) - len(role)) <= MAX_EDIT):
        raise FormError(f"{where} is {role!r}: did you mean `{meant}`?")


def _has_reasoning(raw: Message) -> bool:
    return any(raw.get(key) for key in REASONING)


def _text(value: Any, role: str, calls: bool, raw: Message, where: str) -> str:
    """Return the content as one string; a message with calls or reasoning may have none."""
    if isinstance(value, str):
        return value
    if value is None or value == []:
        return "" if calls or _has_reasoning(raw) else _no_text(raw, where)
    if isinstance(value, list) and not (role in TOOL_ROLES and not any(_is_part(part) for part in value)):
        return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(value))
    if role in TOOL_ROLES and isinstance(value, dict | list | int | float):
        return json.dumps(without_nulls(value), ensure_ascii=False)
    raise FormError(f"{where}: `role` and `content` must be strings")


def _no_text(raw: Message, where: str) -> NoReturn:
    if "content" not in raw and "value" not in raw:
        raise FormError(f"{where} has {sorted(raw)}, expected `role` and `content`")
    raise FormError(f"{where}.{_content_key(raw)} is empty (null): expected a string, text parts or `tool_calls`")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and "type" in part)


def _part(part: Any, where: str) -> str:
    """Return the text of one part of a content list."""
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
    raise FormError(f"{where} is a part of type `{kind}`, but only text can be trained on: {hint}")
