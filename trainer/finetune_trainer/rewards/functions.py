"""Rewards that need no model: a user's function, a right answer, a pattern."""

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
    """The function at an import path such as `package.module:name`.

    A module that is installed comes before one beside the job's file, which on a cluster is not there.

    Raises:
        ImportError: there is no such module, or it can't be imported.
        AttributeError: the module has no such name.
        TypeError: what goes by the name can't be called.
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
    """1 where the answer is what the column says, white space around both left out; None where the column is empty."""

    def __init__(self, column: str) -> None:
        self.column, self.__name__ = column, "exact_match"

    def __call__(self, completions: list[Completion], **columns: Any) -> list[float | None]:
        right = columns[self.column]
        pairs = zip(completions, right, strict=True)
        return [None if one is None else float(text_of(answer).strip() == str(one).strip()) for answer, one in pairs]


class PatternMatch:
    """1 where a regular expression is found in the answer."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.__name__ = re.compile(pattern), "regex"

    def __call__(self, completions: list[Completion], **_: Any) -> list[float | None]:
        return [float(self.pattern.search(text_of(answer)) is not None) for answer in completions]


def text_of(completion: Completion) -> str:
    """An answer's text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
