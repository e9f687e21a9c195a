"""A fault in a job, with the field it is about: what every check of ours returns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One fault. `path` is the field as a user writes it (`stages[1].sft.learningRate`), empty for the job itself."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely means, upper and lower case aside; None where none is near."""
    by_folded = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower().replace("_", ""), by_folded, n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`: did you mean `x`?` where a valid name is near, else `; expected one of …`."""
    names = sorted(valid)
    close = nearest(name, names)
    if close is not None:
        return f": did you mean `{close}`?"
    return f"; expected one of {', '.join(names)}" if names else ""
