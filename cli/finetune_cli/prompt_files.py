"""Read prompts from the command line, from standard input and from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from finetune_api.problems import Problem
from finetune_trainer.errors import UserError
from finetune_trainer.generation.prompts import Prompt

COLUMNS = ("prompt", "text", "messages")


def read_prompts(texts: list[str], file: Path | None) -> list[Prompt]:
    """Return all prompts: those of the command line, then those of the file. `-` reads standard input.

    Raises:
        UserError: there are no prompts, the file cannot be read, or rows have no prompt (all such rows at once).
    """
    prompts: list[Prompt] = [sys.stdin.read().rstrip("\n") if text == "-" else text for text in texts]
    if file is not None:
        prompts += _read(file)
    if not prompts:
        raise UserError("no prompt: set --prompt TEXT or --prompts FILE")
    return prompts


def _read(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([Problem("--prompts", f"{file} cannot be read: {error}")]) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    rows = [_row(f"{file}:{number}", line) for number, line in numbered]
    problems = [row for row in rows if isinstance(row, Problem)]
    if problems:
        raise UserError(problems)
    return [row for row in rows if not isinstance(row, Problem)]


def _row(where: str, line: str) -> Prompt | Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Problem(where, f"is not valid JSON: {error}")
    if isinstance(row, str):
        return row
    value = next((row[name] for name in COLUMNS if name in row), None) if isinstance(row, dict) else None
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and _is_conversation(value):
        return value[:-1] if value[-1]["role"] == "assistant" and len(value) > 1 else value
    return Problem(where, f"expected a string or a list of role/content messages in one of {', '.join(COLUMNS)}")


def _is_conversation(value: list[Any]) -> bool:
    def message(each: Any) -> bool:
        return isinstance(each, dict) and all(isinstance(each.get(name), str) for name in ("role", "content"))

    return bool(value) and all(map(message, value))
