"""Recognize rows in the formats of other tools, and suggest settings for other rows.

A format is recognized only if the row has none of the columns that its stage reads by name, and the job neither names
these columns nor sets a template: the job's settings have priority.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune_api.data import DataSpec
from finetune_api.declaration import RowKind
from finetune_trainer.data.json_values import EmptyRow, FormError, kind_name, parse_json
from finetune_trainer.data.messages import SPEAKERS
from finetune_trainer.data.row_kinds import row_kind

Row = dict[str, Any]
Turns = list[dict[str, str]]
ASKING = ("user", "system", "developer")
CONVERSATIONS = ("conversations", "conversation")
FORMS = {"text", "messages", "prompt", "completion"}
"""Columns with a row's prompt or text; `chosen` and `rejected` may hold the answers alone."""
QUESTIONS = ("instruction", "question", "query", "problem", "input", "prompt")
CONTEXTS = ("context", "input", "passage")
ANSWERS = ("output", "answer", "response", "completion", "solution", "target", "reply", "label")
TEXTS = ("content", "body", "article", "document", "raw_content", "passage")


@dataclass(frozen=True)
class Form:
    """A recognized row: values by standard column, and the names of those that are texts of a chat's turns."""

    fields: Row
    texts: set[str] = field(default_factory=set)
    note: str = ""
    column: str | None = None
    """The column of the conversation."""


def recognise(row: Row, values: Row, spec: DataSpec, kind: RowKind) -> Form | None:
    """Return the values of a row in a known format; None if the row is used unchanged.

    Args:
        values: the row's values by standard column.

    Raises:
        FormError: the row has a known format, but a value in it is invalid.
    """
    needs = row_kind(kind)
    if needs.joined or spec.template is not None or spec.columns.named & FORMS:
        return None
    if "chosen" in values and "rejected" in values and needs.pairs != "no":
        return None if "prompt" in values else _prompt_of_pair(row, values, spec)
    if needs.pairs == "only" or values.keys() & FORMS:
        return None
    return _sharegpt(row) or (None if spec.transcript else _alpaca(row, needs.needs_answer))


def _prompt_of_pair(row: Row, values: Row, spec: DataSpec) -> Form | None:
    """Return the prompt of a pair whose `chosen` and `rejected` hold the answers alone."""
    column, chat = _conversation(row, "messages", *CONVERSATIONS)
    if column is not None and _are_answers(values["chosen"]):
        if _speaker(chat[-1]) == "assistant":
            raise FormError(f"`{column}` ends with an answer besides `chosen` and `rejected`: remove that answer")
        return Form({"prompt": chat}, note=f"the prompt's turns from column `{column}`", column=column)
    if isinstance(row.get("instruction"), str) and isinstance(values["chosen"], str) and not spec.transcript:
        return _alpaca_pair(row)
    return None


def _sharegpt(row: Row) -> Form | None:
    column, chat = _conversation(row, *CONVERSATIONS)
    if column is None:
        return None
    style = "conversations" if chat[0].get("role") is not None else "ShareGPT conversations"
    return Form({"messages": chat}, note=f"{style} from column `{column}`", column=column)


def _alpaca(row: Row, needs_answer: bool) -> Form | None:
    """Recognize `instruction`, `input` and `output`, with earlier turns in `history` as in LLaMA-Factory."""
    if "instruction" not in row or ("output" not in row and needs_answer):
        return None
    prompt, answer = _instruction(row), _string(row.get("output"), "output")
    if not answer and needs_answer:
        raise EmptyRow("empty")
    note = f"Alpaca rows from columns {_listed(name for name in ('instruction', 'input', 'output') if name in row)}"
    turns = _history(row)
    if not turns:
        return Form({"prompt": prompt, "completion": answer}, {"prompt", "completion"}, note)
    now = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Form({"messages": turns + (now if answer else now[:1])}, note=f"{note}, earlier turns from `history`")


def _alpaca_pair(row: Row) -> Form:
    turns, prompt = _history(row), _instruction(row)
    note = f"Alpaca pairs from columns {_listed(name for name in ('instruction', 'input') if name in row)}"
    asked = [*turns, {"role": "user", "content": prompt}] if turns else prompt
    return Form({"prompt": asked}, {"prompt"}, f"{note}, `chosen` and `rejected`")


def _instruction(row: Row) -> str:
    """Return instruction and input as one user message, joined by a line break as in LLaMA-Factory."""
    parts = [_string(row.get(name), name) for name in ("instruction", "input")]
    return "\n".join(part for part in parts if part)


def _history(row: Row) -> Turns:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise FormError(f"`history` is {kind_name(pairs)}, expected a list of pairs `[question, answer]`")
    texts = [(_string(asked, "history"), _string(said, "history")) for asked, said in pairs]
    both = [({"role": "user", "content": asked}, {"role": "assistant", "content": said}) for asked, said in texts]
    return [turn for pair in both for turn in pair]


def _string(value: Any, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise FormError(f"`{name}` is {kind_name(value)}, expected a string")
    return value or ""


def _conversation(row: Row, *columns: str) -> tuple[str | None, list[Row]]:
    """Return the first of the columns that holds a list of messages, and the list."""
    found = ((name, decoded_chat(row.get(name))) for name in columns)
    return next(((name, chat) for name, chat in found if _is_chat(chat)), (None, []))


def decoded_chat(value: Any) -> Any:
    """Return the list of messages in a JSON string; return any other value unchanged."""
    if not isinstance(value, str) or not value[:100].lstrip().startswith("["):
        return value
    try:
        decoded = parse_json(value, "")
    except FormError:
        return value
    return decoded if _is_chat(decoded) else value


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return any(value[0].get(role) is not None for role in ("role", "from"))


def _are_answers(value: Any) -> bool:
    """Return whether one side of a pair is the answer alone: a text, or messages that begin with an answer."""
    first = value[0] if isinstance(value, list) and value else value
    return _speaker(first) not in ASKING if isinstance(first, dict) else isinstance(first, str)


def _speaker(message: Row) -> str:
    role = str(message.get("role") or message.get("from")).lower()
    return SPEAKERS.get(role, role)


def _listed(names: Iterable[str]) -> str:
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def suggestion(row: Row, kind: RowKind) -> str | None:
    """Return the settings line that most likely reads a row with unknown column names, or None."""
    strings, needs = [name for name, value in row.items() if isinstance(value, str)], row_kind(kind)
    if needs.joined:
        column = next((name for name in TEXTS if name in strings), strings[0] if len(strings) == 1 else None)
        return f"columns: {{text: {column}}}" if column else None
    chat = next((name for name, value in row.items() if _is_chat(decoded_chat(value))), None)
    if chat is not None and needs.pairs != "only":
        return f"columns: {{messages: {chat}}}"
    asked = next((name for name in QUESTIONS if name in strings), None)
    if asked is None or not needs.needs_answer:
        return f"columns: {{prompt: {asked}}}" if asked else None
    answer = next((name for name in ANSWERS if name in strings and name != asked), None)
    return _template(row, asked, answer) if needs.pairs != "only" and answer else None


def _template(row: Row, asked: str, answer: str) -> str:
    context = next((name for name in CONTEXTS if isinstance(row.get(name), str) and name not in (asked, answer)), None)
    prompt = f"{{{asked}}}" + (f"\\n\\n{{{context}}}" if context else "")
    return f'template: {{prompt: "{prompt}", completion: "{{{answer}}}"}}'


def forgotten_prompt(row: Row, chosen: Any, rejected: Any) -> str | None:
    """Return the column that is most likely the prompt of a pair whose sides hold the answers alone, or None.

    Two texts that repeat the column's text already contain the prompt.
    """
    if not _are_answers(chosen) or not _are_answers(rejected):
        return None
    sides = [side for side in (chosen, rejected) if isinstance(side, str)]
    asked = ((name, row[name].strip()) for name in QUESTIONS if isinstance(row.get(name), str))
    return next((name for name, text in asked if text and not (sides and all(text in side for side in sides))), None)
