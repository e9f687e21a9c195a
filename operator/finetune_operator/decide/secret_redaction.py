"""Redaction of environment values of the pod template from status, events and log (pure).

Users who may read the job see these values in its spec; its events and the operator's log have other readers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_api.redact import MARK, SHORTEST, is_secret

Json = dict[str, Any]
TEXT_FIELDS = ("message", "traceback", "stopMessage")
LONG = 16
"""A value with this many characters or more may be a secret, whatever the name of its variable."""


def secret_literals(spec: Json) -> list[str]:
    """Return the literal values of environment variables that may be secrets, longest first."""
    template = (spec.get("resources") or {}).get("podTemplate")
    found = {str(value) for name, value in _environment(template) if _may_be_secret(str(name), str(value))}
    return sorted(found, key=len, reverse=True)


def without(text: str, literals: list[str]) -> str:
    """Return the text with all literals replaced by the redaction mark."""
    for literal in literals:
        text = text.replace(literal, MARK)
    return text


def hidden(value: Any, literals: list[str]) -> Any:
    """Return a JSON value without the literals in messages and tracebacks of runs and of Kubernetes."""
    if isinstance(value, dict):
        return {
            name: without(item, literals) if name in TEXT_FIELDS and isinstance(item, str) else hidden(item, literals)
            for name, item in value.items()
        }
    return [hidden(item, literals) for item in value] if isinstance(value, list) else value


def _may_be_secret(name: str, value: str) -> bool:
    return len(value) >= (SHORTEST if is_secret(name) else LONG)


def _environment(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yield name and value of everything in the template that has the form of an environment variable."""
    if isinstance(value, dict):
        if isinstance(value.get("value"), str):
            yield value.get("name", ""), value["value"]
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        yield from _environment(item)
