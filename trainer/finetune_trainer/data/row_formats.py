"""Normalise rows of the data to the normal form of the stage's kind of rows.

Names and formats follow TRL. The normal forms, all JSON-serializable (`row_kinds` has a module for each):

- text: `{text}`
- sft: `{text}`, `{messages}` or `{prompt, completion}`, the last two of strings or of lists of messages
- preference: `{prompt, chosen, rejected}`, all strings or all lists of messages
- prompt: `{prompt, columns}`, the prompt a string or a list of messages, the columns for reward functions:
  the row's other columns and, as `reference`, the answer in the row if it has one

Messages are in the normal form of `messages`. If the row has tools, the example has the key `tools`, a list of schemas
in the normal form of `tools`, for the chat template. A message without loss has `"train": False`, in `messages`,
completions and answers, never in a prompt.

As in TRL, strings in `prompt`/`completion` columns are plain text (prompt, completion, end of text), because nothing
marks them as turns of a conversation. Texts made by `template`, Alpaca rows and strings with a `system` column become a
conversation (system, user, assistant) with the key `templated`. Without a chat template, such a conversation is
tokenized as plain text.
"""

from __future__ import annotations

from finetune_api.data import DataSpec
from finetune_api.declaration import RowKind
from finetune_trainer.data.columns import Fields, read_fields, tools_column
from finetune_trainer.data.json_values import EmptyRow, FormError
from finetune_trainer.data.messages import Message
from finetune_trainer.data.readers import Row
from finetune_trainer.data.row_kinds import Example, row_kind

__all__ = ["EmptyRow", "Example", "FormError", "Kind", "Message", "normalise", "reading"]

Kind = RowKind


def normalise(row: Row, spec: DataSpec, kind: Kind) -> Example:
    """Return a row in the normal form of its kind.

    Raises:
        FormError: the row has another form.
        EmptyRow: the row has nothing to train on.
    """
    found = row_kind(kind)
    fields = read_fields(row, spec, kind)
    example = found.normalise(fields)
    return example if found.joined else _with_tools(example, fields)


def reading(row: Row, spec: DataSpec, kind: Kind) -> str | None:
    """Return a text on what was detected in a row without settings that name it, or None.

    Raises:
        FormError, EmptyRow: as `normalise`.
    """
    if row_kind(kind).joined:
        return None
    fields = read_fields(row, spec, kind)
    parts = [fields.note] if fields.note else []
    if fields.tools:
        parts.append(f"tools from column `{tools_column(row, spec)}`")
    if fields.system and spec.template is None:
        parts.append(f"the system message from column `{spec.columns.system}`")
    return f"reads {', '.join(parts)}" if parts else None


def _with_tools(example: Example, fields: Fields) -> Example:
    tools = fields.tools
    if not tools:
        return example
    column = str(tools_column(fields.row, fields.spec))
    if "messages" not in example and not isinstance(example.get("prompt"), list):
        raise FormError(
            f"the row offers tools in column `{column}`, but its text is plain, and only a chat template writes tools: "
            "give the texts as messages, or set `columns: {tools: none}` to leave the column out"
        )
    if "columns" in example:
        example = {**example, "columns": {**example["columns"], column: tools}}
    return {**example, "tools": tools}
