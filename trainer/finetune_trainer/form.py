"""The form in which a model was trained, kept beside its weights: what it was not trained on, it answers badly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

FORM_FILE = "finetune.json"
"""In a result's directory."""

Form = Literal["chat", "prompt-completion", "text"]
"""How rows reach the model: through the chat template, as a prompt with its completion right after it, or as a text."""
FORMS: dict[Form, str] = {
    "chat": "conversations through the chat template",
    "prompt-completion": "prompts and completions as plain text",
    "text": "plain text",
}


def form_of(row: Mapping[str, Any], has_template: bool) -> Form:
    """Return the form of a normalised row (`data.forms`), for a tokenizer with or without a chat template."""
    if "text" in row:
        return "text"
    if "messages" in row:
        return "chat"
    plain = isinstance(row["prompt"], str) or (row.get("templated", False) and not has_template)
    return "prompt-completion" if plain else "chat"


def main_form(rows: Mapping[str, int]) -> Form | None:
    """Return the form to ask in after training on so many rows of each form; None where there are none.

    Chat where any row is one, because a chat model may be trained on documents too and still be asked in chats.
    """
    counts = {form: rows[form] for form in FORMS if rows.get(form)}
    if not counts:
        return None
    return "chat" if "chat" in counts else max(counts, key=lambda form: counts[form])


def write_form(directory: Path, stage: str, rows: Mapping[str, int]) -> None:
    """Write beside a result's weights how many rows of each form its last stage was trained on; nothing for no rows."""
    form = main_form(rows)
    if form is not None:
        facts = {"trainedAs": form, "rows": dict(rows), "stage": stage}
        (directory / FORM_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_form(directory: str | Path) -> Form | None:
    """Return the form in which a result was trained; None for any other model, of which that is not known."""
    try:
        known = json.loads(Path(directory, FORM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = known.get("trainedAs") if isinstance(known, dict) else None
    return next((form for form in FORMS if form == found), None)
