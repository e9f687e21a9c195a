"""Rewards without a model: a user's function, an exact match, a pattern."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Completion = str | list[dict[str, Any]]
RewardFunction = Callable[..., list[float | None]]


def load_function(path: str, base_dir: str) -> RewardFunction:
    """Return the function at an import path such as `package.module:name`.

    An installed module has priority over one in the directory of the job's file, which does not exist on a cluster.

    Raises:
        ImportError: the module does not exist or can't be imported.
        AttributeError: the module has no such attribute.
        TypeError: the attribute is not callable.
    """
    module, _, name = path.partition(":")
    if base_dir and base_dir not in sys.path and Path(base_dir).is_dir():
        sys.path.append(base_dir)
    function = getattr(import_module(module), name)
    if not callable(function):
        raise TypeError(f"{path} is a {type(function).__name__}, expected a function")
    found: RewardFunction = function
    return found


class ExactMatch:
    """A reward of 1 if the completion equals the column's value except for outer white space; None if that is empty."""

    def __init__(self, column: str) -> None:
        self.column, self.__name__ = column, "exact_match"

    def __call__(self, completions: list[Completion], **columns: Any) -> list[float | None]:
        expected = columns[self.column]
        pairs = zip(completions, expected, strict=True)
        return [None if one is None else float(text_of(answer).strip() == str(one).strip()) for answer, one in pairs]


class PatternMatch:
    """A reward of 1 if a regular expression matches anywhere in the completion, else 0."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.__name__ = re.compile(pattern), "regex"

    def __call__(self, completions: list[Completion], **_: Any) -> list[float | None]:
        return [float(self.pattern.search(text_of(answer)) is not None) for answer in completions]


def text_of(completion: Completion) -> str:
    """Return the text of a completion."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
