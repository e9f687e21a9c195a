"""Values that a user wrote into the pod template's environment, kept out of what the operator says (pure).

The job itself shows them to whoever may read it; its status, its events and the operator's log reach other readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_api.redact import MARK, SHORTEST, is_secret

Json = dict[str, Any]
SAID = ("message", "traceback", "stopMessage")
LONG = 16
"""A value of so many characters may be a secret whatever its variable is called."""


def secret_literals(spec: Json) -> list[str]:
    """Literal values of environment variables that may be secrets, longest first."""
    template = (spec.get("resources") or {}).get("podTemplate")
    found = {str(value) for name, value in _environment(template) if _may_be_secret(str(name), str(value))}
    return sorted(found, key=len, reverse=True)


def without(text: str, literals: list[str]) -> str:
    """A text that has none of the literals."""
    for literal in literals:
        text = text.replace(literal, MARK)
    return text


def hidden(value: Any, literals: list[str]) -> Any:
    """JSON in which no text that a run or Kubernetes has said has one of the literals."""
    if isinstance(value, dict):
        return {
            name: without(item, literals) if name in SAID and isinstance(item, str) else hidden(item, literals)
            for name, item in value.items()
        }
    return [hidden(item, literals) for item in value] if isinstance(value, list) else value


def _may_be_secret(name: str, value: str) -> bool:
    return len(value) >= (SHORTEST if is_secret(name) else LONG)


def _environment(value: Any) -> Iterable[tuple[Any, Any]]:
    """Name and value of everything that looks like a variable, wherever it is in the template."""
    if isinstance(value, dict):
        if isinstance(value.get("value"), str):
            yield value.get("name", ""), value["value"]
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        yield from _environment(item)
