"""Parse the JSON object in a teacher's answer, with or without text around it."""

from __future__ import annotations

import json
import re
from typing import Any

THINKING = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
FENCE = re.compile(r"```[\w-]*\n(.*?)```", re.DOTALL)
TRIES = 50
"""Maximum number of positions in an answer at which an object is searched."""


class Malformed(ValueError):
    """An answer that lacks the requested format; the message is sent to the teacher."""


def without_thinking(text: str) -> str:
    """Return the answer without the reasoning that some models write before it."""
    return THINKING.sub("", text).strip()


def json_object(text: str) -> dict[str, Any]:
    """Return the first JSON object of an answer: the whole answer, in a fenced block, or inside of text.

    Raises:
        Malformed: there is none.
    """
    plain = without_thinking(text)
    for candidate in (plain, *FENCE.findall(plain)):
        value = _parsed(candidate)
        if isinstance(value, dict):
            return value
    decoder = json.JSONDecoder(strict=False)
    starts = [match.start() for match in re.finditer(r"\{", plain)][:TRIES]
    for start in starts:
        try:
            value, _ = decoder.raw_decode(plain, start)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    raise Malformed("it holds no JSON object")


def text_of(value: dict[str, Any], name: str) -> str:
    """Return a string of an object, stripped.

    Raises:
        Malformed: it is missing or not a string.
    """
    text = value.get(name)
    if not isinstance(text, str):
        raise Malformed(f"`{name}` is missing or not a string")
    return text.strip()


def flag_of(value: dict[str, Any], name: str) -> bool:
    """Return a boolean of an object.

    Raises:
        Malformed: it is missing or neither true nor false.
    """
    flag = value.get(name)
    if isinstance(flag, str) and flag.lower() in ("true", "false", "yes", "no"):
        return flag.lower() in ("true", "yes")
    if not isinstance(flag, bool):
        raise Malformed(f"`{name}` is missing or neither true nor false")
    return flag


def pairs_of(value: dict[str, Any], *names: str) -> list[dict[str, str]]:
    """Return the objects of `pairs`, each with the named strings.

    Raises:
        Malformed: there is no list, or no element has all of them.
    """
    pairs = value.get("pairs")
    if not isinstance(pairs, list):
        raise Malformed("`pairs` is missing or not a list")
    found = [
        pair for pair in pairs if isinstance(pair, dict) and all(isinstance(pair.get(name), str) for name in names)
    ]
    if not found:
        raise Malformed(f"no element of `pairs` has {', '.join(f'`{name}`' for name in names)}")
    return [{name: pair[name].strip() for name in names} for pair in found]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
