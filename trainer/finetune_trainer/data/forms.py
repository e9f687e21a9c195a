"""Row forms: what a row of the data means to a stage, in one normal form per kind of stage.

Names and forms are TRL's. The normal forms, all JSON-able:

- text: `{text}`
- sft: `{text}`, `{messages}` or `{prompt, completion}`, the last two of strings or of lists of messages
- preference: `{prompt, chosen, rejected}`, all strings or all lists of messages
- prompt: `{prompt, columns}`, the prompt a string or a list of messages, the columns what reward functions may ask for:
  the row's others and, as `reference`, the answer that the row itself gives to the prompt

As in TRL, strings in `prompt`/`completion` columns are plain text (prompt, completion, end of text), because nothing
says that they are turns of a chat. Texts made by `template` do say so: they become a conversation
(system, user, assistant), marked `templated`, which a tokenizer without a chat template reads as plain text.
"""

from __future__ import annotations

import re
from typing import Any

from finetune_api.data import DataSpec, RowKind, Transcript
from finetune_api.problems import did_you_mean, nearest
from finetune_trainer.data.readers import Row

Kind = RowKind
Message = dict[str, Any]
Example = dict[str, Any]

NEEDED = {
    "text": "`text`",
    "sft": "`messages`, `prompt` and `completion`, or `text`",
    "preference": "`chosen` and `rejected`",
    "prompt": "`prompt`, `messages`, or `chosen` and `rejected`",
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SLIP = 2
"""Letters that a slip adds or leaves out: `function_call` is a role of its own."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class FormError(ValueError):
    """A row that does not have the form its stage needs; the message says why."""


class EmptyRow(ValueError):
    """A row in the right form that has no text, or a pair that shares no prompt: left out and counted."""


def template_columns(template: str) -> list[str]:
    """The columns that a template names."""
    return [name for name in _FIELD.findall(template) if name]


def fill(template: str, row: Row) -> str:
    """The template with a row's values; an absent value (null) is empty text.

    Raises:
        FormError: the row has no such column.
    """

    def value(match: re.Match[str]) -> str:
        if match.group(0) in ("{{", "}}"):
            return match.group(0)[0]
        name = match.group(1)
        if name not in row:
            raise FormError(f"template names the column `{name}`, which is not there{did_you_mean(name, row)}")
        return "" if row[name] is None else str(row[name])

    return _FIELD.sub(value, template)


def normalise(row: Row, spec: DataSpec, kind: Kind) -> Example:
    """A row in its normal form.

    Raises:
        FormError: it has another form.
        EmptyRow: it has nothing to train on.
    """
    fields, templated = _fields(row, spec)
    if kind == "text":
        return {"text": _text(_need(fields, "text", spec, row, kind))}
    if kind == "preference":
        return _preference(fields, templated, spec, row)
    if kind == "prompt":
        return _prompt(fields, templated, spec, row)
    return _sft(fields, templated, spec, row)


def _fields(row: Row, spec: DataSpec) -> tuple[Row, set[str]]:
    """Values by standard name, and which of them a template made."""
    names = spec.columns.model_dump()
    fields = {name: row[column] for name, column in names.items() if row.get(column) is not None}
    templates = spec.template.model_dump(exclude_none=True) if spec.template else {}
    fields |= {name: fill(template, row) for name, template in templates.items()}
    return fields, set(templates)


def _need(fields: Row, name: str, spec: DataSpec, row: Row, kind: Kind) -> Any:
    if name in fields:
        return fields[name]
    column = getattr(spec.columns, name)
    if column in row:
        raise EmptyRow("empty")
    raise FormError(_not_there(name, spec, row, kind))


def _not_there(name: str, spec: DataSpec, row: Row, kind: Kind) -> str:
    column = getattr(spec.columns, name)
    near = nearest(column, row)
    hint = f": did you mean `{near}`?" if near else "."
    there = ", ".join(f"`{key}`" for key in row) or "no columns"
    return (
        f"no column `{column}`{hint} The row has {there}; this stage needs {NEEDED[kind]} "
        "(`columns` gives other names, `template` makes texts from columns)"
    )


def _likely(spec: DataSpec, row: Row) -> str:
    """The standard column that the row most likely means to have."""
    names = [name for name in ("messages", "prompt", "text") if nearest(getattr(spec.columns, name), row)]
    return (names or ["messages"])[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormError(f"`text` is {kind_name(value)}, expected a string")
    if not value:
        raise EmptyRow("empty")
    return value


def _sft(fields: Row, templated: set[str], spec: DataSpec, row: Row) -> Example:
    if "text" in templated:
        return _plain_or_transcript(fields["text"], spec)
    if {"prompt", "completion"} & templated:
        prompt = _turns(_need(fields, "prompt", spec, row, "sft"), "user", "prompt", spec)
        completion = _turns(_need(fields, "completion", spec, row, "sft"), "assistant", "completion", spec)
        return {"prompt": _system(fields) + prompt, "completion": completion, "templated": True}
    if "messages" in fields:
        messages = _messages(fields["messages"], "messages", spec)
        return {"messages": _check_turns(_system(fields) + messages)}
    if "prompt" in fields or "completion" in fields or "text" not in fields:
        return _prompt_completion(fields, spec, row)
    return _plain_or_transcript(fields["text"], spec)


def _plain_or_transcript(text: Any, spec: DataSpec) -> Example:
    if spec.transcript is None:
        return {"text": _text(text)}
    return {"messages": _check_turns(parse_transcript(_text(text), spec.transcript))}


def _prompt_completion(fields: Row, spec: DataSpec, row: Row) -> Example:
    if "prompt" not in fields and "completion" not in fields:
        raise FormError(_not_there(_likely(spec, row), spec, row, "sft"))
    prompt = _need(fields, "prompt", spec, row, "sft")
    completion = _need(fields, "completion", spec, row, "sft")
    if isinstance(prompt, str) and isinstance(completion, str) and "system" not in fields:
        return {"prompt": prompt, "completion": _text_of(completion)}
    prompt = _system(fields) + _turns(prompt, "user", "prompt", spec)
    return {"prompt": prompt, "completion": _turns(completion, "assistant", "completion", spec)}


def _text_of(completion: str) -> str:
    if not completion:
        raise EmptyRow("empty")
    return completion


def _check_turns(messages: list[Message]) -> list[Message]:
    if not messages:
        raise EmptyRow("empty")
    return messages


def _system(fields: Row) -> list[Message]:
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _turns(value: Any, role: str, name: str, spec: DataSpec) -> list[Message]:
    """Messages as they are; a string as one turn of `role`."""
    if isinstance(value, str) and spec.transcript is None:
        return [{"role": role, "content": value}]
    return _messages(value, name, spec)


def _messages(value: Any, name: str, spec: DataSpec) -> list[Message]:
    if isinstance(value, str) and spec.transcript is not None:
        return parse_transcript(value, spec.transcript)
    if not isinstance(value, list):
        expected = "" if name == "messages" else "a string or "
        raise FormError(f"`{name}` is {kind_name(value)}, expected {expected}a list of messages")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise FormError(f"{where} is {kind_name(message)}, expected a message with `role` and `content`")
    if "from" in message and "value" in message:
        role, content, extra = message["from"], message["value"], {}
        if role not in ROLES:
            raise FormError(f"{where}.from is {role!r}{did_you_mean(str(role), ROLES)}")
        role = ROLES[role]
    else:
        if "role" not in message or "content" not in message:
            raise FormError(f"{where} has {sorted(message)}, expected `role` and `content`")
        role, content = message["role"], message["content"]
        extra = {key: item for key, item in message.items() if key not in ("role", "content") and item is not None}
    if not isinstance(role, str) or not isinstance(content, str):
        raise FormError(f"{where}: `role` and `content` must be strings")
    _check_role(role, f"{where}.role")
    return {"role": role, "content": content, **extra}


def _check_role(role: str, where: str) -> None:
    """A role of a template's own is the template's to judge, but not a slip in one that every template has."""
    if role in KNOWN_ROLES:
        return
    meant = ROLES.get(role.lower()) or nearest(role, KNOWN_ROLES)
    if meant is not None and (role.lower() in ROLES or abs(len(meant) - len(role)) <= SLIP):
        raise FormError(f"{where} is {role!r}: did you mean `{meant}`?")


def kind_name(value: Any) -> str:
    """What kind of JSON value it is, for a message: `a number`, `null`."""
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    names |= {dict: "a mapping", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def parse_transcript(text: str, transcript: Transcript) -> list[Message]:
    """The turns of a dialogue in one string; white space around a turn is not part of it.

    Raises:
        FormError: it holds no marker, or text comes before the first one.
    """
    markers = {transcript.user: "user", transcript.assistant: "assistant"}
    pieces = re.split(
        "(" + "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True)) + ")", text
    )
    if len(pieces) == 1 or pieces[0].strip():
        raise FormError(f"a transcript must begin with {transcript.user!r} or {transcript.assistant!r}")
    turns = zip(pieces[1::2], pieces[2::2], strict=True)
    return [{"role": markers[marker], "content": content.strip()} for marker, content in turns]


def _preference(fields: Row, templated: set[str], spec: DataSpec, row: Row) -> Example:
    chosen = _need(fields, "chosen", spec, row, "preference")
    rejected = _need(fields, "rejected", spec, row, "preference")
    if type(chosen) is not type(rejected):
        raise FormError(f"`chosen` is {kind_name(chosen)} and `rejected` {kind_name(rejected)}")
    prompt = fields.get("prompt")
    marked = bool({"prompt", "chosen", "rejected"} & templated)
    strings = isinstance(chosen, str) and spec.transcript is None and not isinstance(prompt, list)
    if strings and not marked and "system" not in fields:
        return _plain_pair(prompt, chosen, rejected)
    good, bad = _turns(chosen, "assistant", "chosen", spec), _turns(rejected, "assistant", "rejected", spec)
    if prompt is None:
        return _split_pair(_system(fields), good, bad, marked)
    start = _system(fields) + _turns(prompt, "user", "prompt", spec)
    good, bad = _after(start, good), _after(start, bad)
    return {"prompt": start, "chosen": good, "rejected": bad, "templated": marked}


def _plain_pair(prompt: Any, chosen: str, rejected: str) -> Example:
    if prompt is not None:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        return {"prompt": "", "chosen": chosen, "rejected": rejected}
    from trl.data_utils import extract_prompt

    pair: Example = extract_prompt({"chosen": chosen, "rejected": rejected})
    return pair


def _after(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The answer without the prompt, where it repeats it."""
    repeated = len(answer) > len(prompt) and answer[: len(prompt)] == prompt
    return answer[len(prompt) :] if repeated else answer


def _split_pair(system: list[Message], chosen: list[Message], rejected: list[Message], marked: bool) -> Example:
    """The prompt is the longest common run of messages that ends in a user's turn."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise EmptyRow("no shared prompt")
    prompt = system + chosen[:shared]
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:], "templated": marked}


RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids", "image", "images"}
"""Names that mean something else to TRL's reward functions, or that TRL fills itself."""


def _prompt(fields: Row, templated: set[str], spec: DataSpec, row: Row) -> Example:
    prompt, reference = _prompt_and_reference(fields, templated, spec, row)
    if not prompt:
        raise EmptyRow("empty")
    names = {column for name, column in spec.columns.model_dump().items() if name in ("prompt", "messages", "text")}
    columns = {name: value for name, value in row.items() if name not in names | RESERVED}
    if reference is not None:
        columns.setdefault("reference", reference)
    return {"prompt": prompt, "columns": columns, "templated": "prompt" in templated}


def _prompt_and_reference(fields: Row, templated: set[str], spec: DataSpec, row: Row) -> tuple[Any, Any]:
    """The prompt, and the answer that the row itself gives to it; None where it gives none."""
    if "prompt" in templated:
        return _system(fields) + _turns(fields["prompt"], "user", "prompt", spec), _content(fields.get("completion"))
    if "messages" in fields:
        return _split_messages(_system(fields) + _messages(fields["messages"], "messages", spec))
    if "prompt" in fields:
        return _given_prompt(fields, spec), _content(fields.get("completion") or fields.get("chosen"))
    if "chosen" in fields and "rejected" in fields:
        pair = _preference(fields, templated, spec, row)
        return pair["prompt"], _content(pair["chosen"])
    if "text" in fields and spec.transcript is not None:
        return _split_messages(_plain_or_transcript(fields["text"], spec)["messages"])
    raise FormError(_not_there("prompt", spec, row, "prompt"))


def _given_prompt(fields: Row, spec: DataSpec) -> Any:
    prompt = fields["prompt"]
    if isinstance(prompt, str) and spec.transcript is None and "system" not in fields:
        return prompt
    return _system(fields) + _turns(prompt, "user", "prompt", spec)


def _split_messages(messages: list[Message]) -> tuple[list[Message], Any]:
    """All before the last message and its text, where that is an assistant's; else all of them."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _content(answer: Any) -> Any:
    """An answer's text: a string, or the first assistant's message of a list."""
    if not isinstance(answer, list):
        return answer
    return next((one.get("content") for one in answer if isinstance(one, dict) and one.get("role") != "user"), None)
