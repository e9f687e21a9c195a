"""Pack examples into rows of a maximum length by best-fit decreasing (arXiv 2404.10830)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return bins of example indices whose total length is at most `capacity`.

    Each example, longest first, goes into the bin where it leaves the least space. Bins are in order of their first
    example, and the examples of a bin in order of their index. TRL's `pack_dataset` computes the same bins, but cuts
    and reorders the examples.

    Args:
        lengths: int64 [examples], none above `capacity`.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise AssertionError(f"an example of {int(lengths.max())} tokens can't be packed into {capacity}")
    by_space: dict[int, list[list[int]]] = defaultdict(list)
    spaces: list[int] = []
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(spaces, length)
        space = spaces[at] if at < len(spaces) else capacity
        chosen = _take(by_space, spaces, at) if at < len(spaces) else _open(bins)
        chosen.append(index)
        _put(by_space, spaces, space - length, chosen)
    return sorted(sorted(one) for one in bins)


def _open(bins: list[list[int]]) -> list[int]:
    bins.append([])
    return bins[-1]


def _take(by_space: dict[int, list[list[int]]], spaces: list[int], at: int) -> list[int]:
    chosen = by_space[spaces[at]].pop()
    if not by_space[spaces[at]]:
        spaces.pop(at)
    return chosen


def _put(by_space: dict[int, list[list[int]]], spaces: list[int], space: int, chosen: list[int]) -> None:
    if not by_space[space]:
        at = bisect_left(spaces, space)
        spaces.insert(at, space)
    by_space[space].append(chosen)
