"""Map a row to the standard columns: by the job's column names, by its templates, or by recognizing the format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune_api.data import DataSpec
from finetune_api.declaration import RowKind
from finetune_api.problems import did_you_mean, nearest
from finetune_trainer.data.format_detection import decoded_chat, recognise, suggestion
from finetune_trainer.data.json_values import EmptyRow, FormError, kind_name
from finetune_trainer.data.messages import Message, read_messages
from finetune_trainer.data.readers import Row
from finetune_trainer.data.row_kinds import row_kind
from finetune_trainer.data.tools import read_tools
from finetune_trainer.data.transcripts import parse_transcript

CHATS = ("messages", "prompt", "completion", "chosen", "rejected")
FUNCTIONS = "functions"
"""Column of the tools in OpenAI's older format."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Fields:
    """A row's values by standard name, without those that are null."""

    row: Row
    spec: DataSpec
    kind: RowKind
    values: Row
    texts: frozenset[str]
    """Names of values that are texts of a chat's turns, according to a template or a recognized format."""
    note: str = ""
    """A description of the recognized format; empty if there is none."""
    column: str | None = None
    """Column of the recognized conversation."""

    @property
    def system(self) -> str | None:
        """Return the system message before the row's conversation, or None.

        Raises:
            FormError: it is not a string.
        """
        value = self.values.get("system")
        if value is not None and not isinstance(value, str):
            hint = "set `columns: {system: none}` if it is not a system message"
            raise FormError(f"`{self.spec.columns.system}` is {kind_name(value)}, expected a string: {hint}")
        return value or None

    @property
    def is_chat(self) -> bool:
        """Return whether the row's strings are turns of a chat, as a system message (even an empty one) implies."""
        return "system" in self.values

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Return the schemas of the row's tools.

        Raises:
            FormError: they are not schemas.
        """
        column = tools_column(self.row, self.spec)
        try:
            return read_tools(self.row[column], column) if column else []
        except FormError as error:
            raise FormError(f"{error}; set `columns: {{tools: none}}` if the column holds no tools") from error

    def need(self, name: str) -> Any:
        """Return a value.

        Raises:
            EmptyRow: it is null.
            FormError: there is no such column.
        """
        if name in self.values:
            return self.values[name]
        if getattr(self.spec.columns, name) in self.row:
            raise EmptyRow("empty")
        raise FormError(self.not_there(name))

    def turns(self, name: str, role: str) -> list[Message]:
        """Return a value as messages. A string is one turn of `role` or a transcript.

        Raises:
            FormError: the value is no string, message or list of messages.
        """
        value = self.need(name)
        if isinstance(value, str) and self.spec.transcript is not None:
            return parse_transcript(value, self.spec.transcript)
        if isinstance(value, str) and name != "messages":
            return [{"role": role, "content": value}]
        if not isinstance(value, list | dict):
            expected = "" if name == "messages" else "a string or "
            raise FormError(f"`{name}` is {kind_name(value)}, expected {expected}a list of messages")
        return read_messages([value] if isinstance(value, dict) else value, name)

    def not_there(self, name: str) -> str:
        """Return the message for a row that lacks the column of this name."""
        column = getattr(self.spec.columns, name)
        near = nearest(column, self.row)
        hint = f": did you mean `{near}`?" if near else "."
        columns = ", ".join(f"`{key}`" for key in self.row) or "no columns"
        line = suggestion(self.row, self.kind)
        remedy = f": set `{line}`" if line else " (set `columns` to map names, or `template` to build texts)"
        needed = row_kind(self.kind).needed
        return f"no column `{column}`{hint} The row has {columns}; this stage needs {needed}{remedy}"


def read_fields(row: Row, spec: DataSpec, kind: RowKind) -> Fields:
    """Return a row's values by standard name.

    Raises:
        FormError: a template names a missing column, or a value in a recognized format is invalid.
        EmptyRow: a row in a recognized format has no answer.
    """
    values = {name: row[column] for name, column in spec.columns if row.get(column) is not None}
    values |= {name: decoded_chat(values[name]) for name in CHATS if name in values}
    if spec.template is not None:
        values.pop("system", None)
        templates = spec.template.model_dump(exclude_none=True)
        values |= {name: fill(template, row) for name, template in templates.items()}
        return Fields(row, spec, kind, values, frozenset(templates))
    form = recognise(row, values, spec, kind)
    if form is None:
        return Fields(row, spec, kind, values, frozenset())
    return Fields(row, spec, kind, values | form.fields, frozenset(form.texts), form.note, form.column)


def tools_column(row: Row, spec: DataSpec) -> str | None:
    """Return the column with the row's tools; None if it has none, or if a template uses the column as text.

    Raises:
        FormError: the job names a missing column, and the row has one with a similar name.
    """
    column = spec.columns.tools
    templates = spec.template.model_dump(exclude_none=True).values() if spec.template else ()
    if any(column in template_columns(template) for template in templates):
        return None
    if row.get(column):
        return column
    if "tools" in spec.columns.named:
        if column not in row and nearest(column, row):
            raise FormError(f"no column `{column}` for the tools{did_you_mean(column, row)}")
        return None
    return FUNCTIONS if _are_functions(row.get(FUNCTIONS)) else None


def _are_functions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "name" in one for one in value)


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [name for name in _FIELD.findall(template) if name]


def fill(template: str, row: Row) -> str:
    """Return the template filled with a row's values; null becomes empty text.

    Raises:
        FormError: the row has no such column.
    """

    def value(match: re.Match[str]) -> str:
        if match.group(0) in ("{{", "}}"):
            return match.group(0)[0]
        name = match.group(1)
        if name not in row:
            raise FormError(f"template names the column `{name}`, which does not exist{did_you_mean(name, row)}")
        return "" if row[name] is None else str(row[name])

    return _FIELD.sub(value, template)
