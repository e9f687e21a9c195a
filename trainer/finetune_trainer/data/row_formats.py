"""Row forms: what a row of the data means to a stage, in one normal form per kind of stage.

Names and forms are TRL's. The normal forms, all JSON-able:

- text: `{text}`
- sft: `{text}`, `{messages}` or `{prompt, completion}`, the last two of strings or of lists of messages
- preference: `{prompt, chosen, rejected}`, all strings or all lists of messages
- prompt: `{prompt, columns}`, the prompt a string or a list of messages, the columns what reward functions may ask for:
  the row's others and, as `reference`, the answer that the row itself gives to the prompt

Messages are in the normal form of `messages`. Where the row offers tools, the example has them as `tools`, a list of
schemas in the normal form of `tools`, for the chat template; else the key is absent. A message that carries no loss has
`"train": False`, in `messages`, completions and answers, never in a prompt.

As in TRL, strings in `prompt`/`completion` columns are plain text (prompt, completion, end of text), because nothing
says that they are turns of a chat. Texts made by `template`, Alpaca rows and strings with a `system` column do say so:
they become a conversation (system, user, assistant), marked `templated`, which a tokenizer without a chat template
reads as plain text.
"""

from __future__ import annotations

from typing import Any

from finetune_api.data import DataSpec, RowKind
from finetune_api.problems import nearest
from finetune_trainer.data.columns import Fields, read_fields, tools_column
from finetune_trainer.data.format_detection import forgotten_prompt
from finetune_trainer.data.json_values import EmptyRow, FormError, kind_name
from finetune_trainer.data.messages import Message, answer_text, without_train
from finetune_trainer.data.prompt_boundary import put_system, split
from finetune_trainer.data.readers import Row
from finetune_trainer.data.transcripts import parse_transcript

__all__ = ["EmptyRow", "Example", "FormError", "Kind", "Message", "normalise", "reading"]

Kind = RowKind
Example = dict[str, Any]

RESERVED = {"prompt", "prompts", "completion", "completions", "completion_ids", "image", "images"}
"""Names that mean something else to TRL's reward functions, or that TRL fills itself."""


def normalise(row: Row, spec: DataSpec, kind: Kind) -> Example:
    """Return a row in its normal form.

    Raises:
        FormError: it has another form.
        EmptyRow: it has nothing to train on.
    """
    given = read_fields(row, spec, kind)
    if kind == "text":
        return {"text": _text(given.need("text"))}
    make = {"preference": _preference, "prompt": _prompt}.get(kind, _sft)
    return _with_tools(make(given), given)


def reading(row: Row, spec: DataSpec, kind: Kind) -> str | None:
    """Return what was recognised in a row that the job's settings do not name, for people; None where nothing was.

    Raises:
        FormError, EmptyRow: as `normalise`.
    """
    if kind == "text":
        return None
    given = read_fields(row, spec, kind)
    parts = [given.note] if given.note else []
    if given.tools:
        parts.append(f"tools from column `{tools_column(row, spec)}`")
    if given.system and spec.template is None:
        parts.append(f"the system message from column `{spec.columns.system}`")
    return f"reads {', '.join(parts)}" if parts else None


def _with_tools(example: Example, given: Fields) -> Example:
    tools = given.tools
    if not tools:
        return example
    column = str(tools_column(given.row, given.spec))
    if "messages" not in example and not isinstance(example.get("prompt"), list):
        raise FormError(
            f"the row offers tools in column `{column}`, but its text is plain, and only a chat template writes tools: "
            "give the texts as messages, or set `columns: {tools: none}` to leave the column out"
        )
    if "columns" in example:
        example = {**example, "columns": {**example["columns"], column: tools}}
    return {**example, "tools": tools}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormError(f"`text` is {kind_name(value)}, expected a string")
    if not value:
        raise EmptyRow("empty")
    return value


def _sft(given: Fields) -> Example:
    if "text" in given.texts:
        return _plain_or_transcript(given)
    if {"prompt", "completion"} & given.texts:
        prompt = put_system(given.system, given.turns("prompt", "user"))
        return {"prompt": prompt, "completion": given.turns("completion", "assistant"), "templated": True}
    if "messages" in given.values:
        return {"messages": _conversation(given)}
    if "prompt" in given.values or "completion" in given.values or "text" not in given.values:
        return _prompt_completion(given)
    return _plain_or_transcript(given)


def _conversation(given: Fields) -> list[Message]:
    messages = given.turns("messages", "user")
    if not messages:
        raise EmptyRow("empty")
    return put_system(given.system, messages)


def _plain_or_transcript(given: Fields) -> Example:
    text = _text(given.values["text"])
    if given.spec.transcript is None:
        return {"text": text}
    return {"messages": put_system(given.system, parse_transcript(text, given.spec.transcript))}


def _prompt_completion(given: Fields) -> Example:
    if "prompt" not in given.values and "completion" not in given.values:
        raise FormError(given.not_there(_likely(given)))
    prompt, completion = given.need("prompt"), given.need("completion")
    strings = isinstance(prompt, str) and isinstance(completion, str)
    if completion == "":
        raise EmptyRow("empty")
    if strings and not given.is_chat and given.spec.transcript is None:
        return {"prompt": prompt, "completion": completion}
    made = split(_asked(given), [given.turns("completion", "assistant")], given.spec.columns.prompt)
    example = {"prompt": put_system(given.system, made.prompt), "completion": made.answers[0]}
    return {**example, "templated": True} if strings and given.spec.transcript is None else example


def _likely(given: Fields) -> str:
    """The standard column that the row most likely means to have."""
    columns = given.spec.columns
    names = [name for name in ("messages", "prompt", "text") if nearest(getattr(columns, name), given.row)]
    return (names or ["messages"])[0]


def _asked(given: Fields) -> str | list[Message] | None:
    """The row's prompt: a text, messages, or nothing."""
    prompt = given.values.get("prompt")
    if prompt is None or (isinstance(prompt, str) and given.spec.transcript is None):
        return prompt
    return given.turns("prompt", "user")


def _preference(given: Fields) -> Example:
    chosen, rejected = given.need("chosen"), given.need("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise FormError(f"`chosen` is {kind_name(chosen)} and `rejected` {kind_name(rejected)}")
    marked = bool({"prompt", "chosen", "rejected"} & given.texts)
    strings = isinstance(chosen, str) and given.spec.transcript is None
    strings = strings and not isinstance(given.values.get("prompt"), list)
    if given.values.get("prompt") is None and "prompt" not in given.spec.columns.named:
        _refuse_forgotten(given)
    if strings and not marked and not given.is_chat:
        return _plain_pair(given.values.get("prompt"), chosen, rejected)
    answers = [given.turns(name, "assistant") for name in ("chosen", "rejected")]
    made = split(_asked(given), answers, given.spec.columns.prompt)
    prompt = put_system(given.system, made.prompt)
    return {"prompt": prompt, "chosen": made.answers[0], "rejected": made.answers[1], "templated": marked or strings}


def _refuse_forgotten(given: Fields) -> None:
    """Refuse a pair without a prompt beside a column that says what it answers."""
    column = forgotten_prompt(given.row, given.values["chosen"], given.values["rejected"])
    if column is not None:
        raise FormError(
            f"the row has no `prompt`, and its answers do not repeat what column `{column}` says: set "
            f"`columns: {{prompt: {column}}}` if that is what they answer, else `columns: {{prompt: none}}`"
        )


def _plain_pair(prompt: Any, chosen: str, rejected: str) -> Example:
    if prompt is not None:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        return {"prompt": "", "chosen": chosen, "rejected": rejected}
    from trl.data_utils import extract_prompt

    pair: Example = extract_prompt({"chosen": chosen, "rejected": rejected})
    return pair


def _prompt(given: Fields) -> Example:
    prompt, reference, templated = _prompt_and_reference(given)
    if not prompt:
        raise EmptyRow("empty")
    names = {given.column, *(getattr(given.spec.columns, name) for name in ("prompt", "messages", "text"))}
    columns = {name: value for name, value in given.row.items() if name not in names | RESERVED}
    if reference is not None:
        columns.setdefault("reference", reference)
    prompt = prompt if isinstance(prompt, str) else without_train(prompt)
    return {"prompt": prompt, "columns": columns, "templated": templated}


def _prompt_and_reference(given: Fields) -> tuple[Any, Any, bool]:
    """The prompt, the answer that the row itself gives to it (None where it gives none), and whether they are
    `templated`."""
    values = given.values
    if "messages" in values and given.column != given.spec.columns.messages:
        return *_split_messages(_conversation(given)), False
    if "chosen" in values and "rejected" in values and "prompt" not in given.texts:
        pair = _preference(given)
        return pair["prompt"], _reference(pair["chosen"]), bool(pair.get("templated"))
    if "prompt" in values:
        return _given_prompt(given)
    if "text" in values and given.spec.transcript is not None:
        return *_split_messages(_plain_or_transcript(given)["messages"]), False
    raise FormError(given.not_there("prompt"))


def _given_prompt(given: Fields) -> tuple[Any, Any, bool]:
    """The prompt of a row without a pair; a string is a turn where its answer is a chat or a template says so."""
    name = next((name for name in ("completion", "chosen") if given.values.get(name)), "")
    reference, asked = given.values.get(name), _asked(given)
    if isinstance(reference, list | dict):
        made = split(asked, [given.turns(name, "assistant")], given.spec.columns.prompt)
        return put_system(given.system, made.prompt), _reference(made.answers[0]), False
    if not isinstance(asked, str):
        return put_system(given.system, asked or []), reference, "prompt" in given.texts
    if "prompt" not in given.texts and not given.is_chat:
        return asked, reference, False
    return put_system(given.system, [{"role": "user", "content": asked}]), reference, True


def _split_messages(messages: list[Message]) -> tuple[list[Message], Any]:
    """All before the last message and what it says, where that is an assistant's; else all of them."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], answer_text(messages[-1])
    return messages, None


def _reference(answer: Any) -> Any:
    """An answer's text: a string, or what the first assistant's message of a list says."""
    if isinstance(answer, str):
        return answer
    return next((answer_text(message) for message in answer if message["role"] == "assistant"), None)
