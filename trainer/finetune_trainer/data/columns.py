"""Values of a row by the names of the standard columns: from the columns that the job names, from its templates, or
recognised."""

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
"""Where rows of OpenAI's older form have their tools."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Fields:
    """A row's values by standard name, without those that are null."""

    row: Row
    spec: DataSpec
    kind: RowKind
    values: Row
    texts: frozenset[str]
    """Names of values that are texts of a chat's turns, because a template or a recognised form says so."""
    note: str = ""
    """What was recognised, for people; empty where nothing was."""
    column: str | None = None
    """Column of the recognised conversation."""

    @property
    def system(self) -> str | None:
        """The system message that stands before the row's conversation; None where there is none.

        Raises:
            FormError: it is no string.
        """
        value = self.values.get("system")
        if value is not None and not isinstance(value, str):
            hint = "set `columns: {system: none}` if it is no system message"
            raise FormError(f"`{self.spec.columns.system}` is {kind_name(value)}, expected a string: {hint}")
        return value or None

    @property
    def is_chat(self) -> bool:
        """Whether a system message, be it empty, says that the row's strings are turns of a chat."""
        return "system" in self.values

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that the row offers; an empty list where it offers none.

        Raises:
            FormError: they are no schemas.
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
        """Return a value as messages: a string is one turn of `role`, or a transcript; one message is a list of one.

        Raises:
            FormError: it is something else.
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
        """Return what to say of a row that has no column of this name."""
        column = getattr(self.spec.columns, name)
        near = nearest(column, self.row)
        hint = f": did you mean `{near}`?" if near else "."
        there = ", ".join(f"`{key}`" for key in self.row) or "no columns"
        line = suggestion(self.row, self.kind)
        remedy = f": set `{line}`" if line else " (`columns` gives other names, `template` makes texts from columns)"
        return f"no column `{column}`{hint} The row has {there}; this stage needs {row_kind(self.kind).needed}{remedy}"


def read_fields(row: Row, spec: DataSpec, kind: RowKind) -> Fields:
    """Return a row's values by standard name.

    Raises:
        FormError: a template names a column that is not there, or a recognised form is not kept to.
        EmptyRow: a row of a recognised form has no answer.
    """
    given = {name: row[column] for name, column in spec.columns if row.get(column) is not None}
    given |= {name: decoded_chat(given[name]) for name in CHATS if name in given}
    if spec.template is not None:
        given.pop("system", None)
        templates = spec.template.model_dump(exclude_none=True)
        given |= {name: fill(template, row) for name, template in templates.items()}
        return Fields(row, spec, kind, given, frozenset(templates))
    form = recognise(row, given, spec, kind)
    if form is None:
        return Fields(row, spec, kind, given, frozenset())
    return Fields(row, spec, kind, given | form.fields, frozenset(form.texts), form.note, form.column)


def tools_column(row: Row, spec: DataSpec) -> str | None:
    """Return the column with the row's tools; None where it has none, or where a template makes text of the column.

    Raises:
        FormError: the job names a column that is not there, and one of a similar name is.
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
    """Return the template with a row's values; an absent value (null) is empty text.

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
