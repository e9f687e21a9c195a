"""The prompt format in which a model was trained, saved with its weights: other formats give worse completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

FORM_FILE = "finetune.json"
"""File in the directory of a result."""

Form = Literal["chat", "prompt-completion", "text"]
"""The format of rows: with the chat template, as a prompt directly followed by its completion, or as a text."""
FORMS: dict[Form, str] = {
    "chat": "conversations through the chat template",
    "prompt-completion": "prompts and completions as plain text",
    "text": "plain text",
}


def form_of(row: Mapping[str, Any], has_template: bool) -> Form:
    """Return the form of a normalised row (`data.row_formats`), for a tokenizer with or without a chat template."""
    if "text" in row:
        return "text"
    if "messages" in row:
        return "chat"
    plain = isinstance(row["prompt"], str) or (row.get("templated", False) and not has_template)
    return "prompt-completion" if plain else "chat"


def main_form(rows: Mapping[str, int]) -> Form | None:
    """Return the form for prompts to a model, given its training rows of each form; None if there are no rows.

    It is `chat` if any row is a chat, because chat models are often trained on documents too.
    """
    counts: dict[Form, int] = {form: rows[form] for form in FORMS if rows.get(form)}
    if not counts:
        return None
    return "chat" if "chat" in counts else max(counts.items(), key=lambda item: item[1])[0]


def write_form(directory: Path, stage: str, rows: Mapping[str, int]) -> None:
    """Write the form and the number of training rows of each form to a result's directory; nothing without rows.

    Args:
        directory: directory of the result.
        stage: name of the stage.
        rows: number of training rows of each form.
    """
    form = main_form(rows)
    if form is not None:
        facts = {"trainedAs": form, "rows": dict(rows), "stage": stage}
        (directory / FORM_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_form(directory: str | Path) -> Form | None:
    """Return the form in which a result was trained; None for other models, whose form is unknown."""
    try:
        known = json.loads(Path(directory, FORM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = known.get("trainedAs") if isinstance(known, dict) else None
    return next((form for form in FORMS if form == found), None)
