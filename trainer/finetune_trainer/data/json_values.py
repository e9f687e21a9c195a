"""Handle JSON values of rows: their names in messages, the nulls that Arrow adds, and JSON in strings."""

from __future__ import annotations

import json
from typing import Any

SHOWN = 60
"""Maximum characters of a text in a message."""


class FormError(ValueError):
    """A row that does not have the format its stage needs; the message says why."""


class EmptyRow(ValueError):
    """A valid row that has nothing to train on, or a pair without a shared prompt: it is skipped and counted."""


def kind_name(value: Any) -> str:
    """Return the kind of a JSON value for a message, such as `a number` or `null`."""
    names = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    names |= {dict: "a mapping", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """Return a nested value without keys whose value is null; null items of lists are kept.

    Arrow (Parquet, `datasets`) gives every struct of a column the same keys and fills absent ones with null. This is
    the rule of `trl.trainer.utils.remove_none_values`, which takes seconds to import.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON string. Control characters inside of strings are allowed.

    Raises:
        FormError: it is not JSON.
    """
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise FormError(f"{where} is a string that is not JSON ({error}): {short(text)!r}") from error


def short(text: str) -> str:
    """Return the text, truncated for a message."""
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
