"""Texts of validation messages: field paths, values and expected types."""

from __future__ import annotations

import re
import reprlib

from finetune_api.base import Json
from finetune_api.problems import nearest

Loc = tuple[str | int, ...]

_SHOWN = 40
_NUMBER = re.compile(r"([+-]?)(\d+)(\.\d*)?(?:[eE]([+-]?)(\d+))?")
_PLAIN_KEY = re.compile(r"[\w-]+")


def field_path(loc: Loc) -> str:
    """Return a location as a field path, such as `stages[1].sft`.

    The path has no leading `spec`. It is empty for the job and its spec.
    """
    path = ""
    for part in loc[1:] if loc[:1] == ("spec",) else loc:
        if isinstance(part, str) and _PLAIN_KEY.fullmatch(part):
            path += f".{part}" if path else part
        else:
            path += f"[{part}]"
    return path


def object_path(loc: Loc) -> str:
    """Return a location for a phrase such as "unknown field in ...": `field_path`, `spec` or `the job`."""
    return field_path(loc) or ("spec" if loc else "the job")


def shown(value: object) -> str:
    """Return a value for a message: shortened, and in YAML notation."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {counted(len(value), 'item')}" if value else "an empty list"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}... ({len(value)} characters)"
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python writes out
        return "a number with too many digits"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 item`, `2 items`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_sentence(text: str) -> str:
    """Return the first sentence of a description, on one line."""
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", " ".join(text.split()), maxsplit=1)[0]


def expected(schema: Json) -> str:
    """Return a description of the values that a field accepts, including bounds."""
    if "enum" in schema:
        values = [str(value) for value in schema["enum"]]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if "expects" in schema:
        return str(schema["expects"])
    match schema.get("type"):
        case "string":
            return "text" + _span(schema.get("minLength"), schema.get("maxLength"), "character")
        case "array":
            return "a list" + _span(schema.get("minItems"), schema.get("maxItems"), "item")
        case "integer":
            return "a whole number" + _range(schema)
        case "number":
            return "a number" + _range(schema)
        case "boolean":
            return "true or false"
        case _:
            return "a mapping"


def _span(least: int | None, most: int | None, noun: str) -> str:
    if least is None and most is None:
        return ""
    if most is None:
        return f" of at least {counted(least or 0, noun)}"
    return f" of {least} to {counted(most, noun)}" if least else f" of up to {counted(most, noun)}"


def _range(schema: Json) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None or high is None:
        return ""
    above, below = schema.get("exclusiveMinimum") is True, schema.get("exclusiveMaximum") is True
    start = f" above {_plain(low)} and" if above else f" from {_plain(low)}"
    end = f" to below {_plain(high)}" if below else f" {'up ' if above else ''}to {_plain(high)}"
    return start + end


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def mismatch(value: object, schema: Json) -> str:
    """Return `got ..., expected ...`, with a hint if the value suggests one."""
    got, wanted = shown(value), expected(schema)
    if isinstance(value, str) and schema.get("type") in ("number", "integer"):
        hint = _number_hint(value)
        return f"got {got}{hint}, expected {wanted}"
    if isinstance(value, int | float) and schema.get("type") == "string" and "enum" not in schema:
        return f"got {got}, expected {wanted}: put it in quotes"
    close = nearest(str(value), map(str, schema["enum"])) if isinstance(value, str) and "enum" in schema else None
    return f"got {got}, expected {wanted}" + (f": did you mean {close}?" if close and len(schema["enum"]) > 1 else "")


def _number_hint(text: str) -> str:
    """Return how to write a number that YAML parses as text (quoted, or `1e-4` in YAML 1.1), else an empty string."""
    match = _NUMBER.fullmatch(text.strip()[:_SHOWN])
    if match is None:
        return ""
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    number = sign + whole + (fraction or "")
    if exponent:
        fraction = fraction if fraction and fraction != "." else ".0"
        number = f"{sign}{whole}{fraction}e{exponent_sign or '+'}{exponent}"
    return f" (text, not a number: write {number}, without quotes)"
