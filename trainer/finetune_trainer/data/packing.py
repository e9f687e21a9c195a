"""Best-fit-decreasing packing of examples into rows of one length (arXiv 2404.10830)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Bins of example indices, none longer than `capacity` in all; each example, longest first, goes where it
    leaves the least room. Bins come in order of their first example, as do the examples in a bin.

    TRL's `pack_dataset` bins in the same way, but cuts and reorders what it packs, so only the binning is done here.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise AssertionError(f"an example of {int(lengths.max())} tokens can't be packed into {capacity}")
    by_room: dict[int, list[list[int]]] = defaultdict(list)
    rooms: list[int] = []
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        room = rooms[at] if at < len(rooms) else capacity
        chosen = _take(by_room, rooms, at) if at < len(rooms) else _open(bins)
        chosen.append(index)
        _put(by_room, rooms, room - length, chosen)
    return sorted(sorted(one) for one in bins)


def _open(bins: list[list[int]]) -> list[int]:
    bins.append([])
    return bins[-1]


def _take(by_room: dict[int, list[list[int]]], rooms: list[int], at: int) -> list[int]:
    chosen = by_room[rooms[at]].pop()
    if not by_room[rooms[at]]:
        rooms.pop(at)
    return chosen


def _put(by_room: dict[int, list[list[int]]], rooms: list[int], room: int, chosen: list[int]) -> None:
    if not by_room[room]:
        at = bisect_left(rooms, room)
        rooms.insert(at, room)
    by_room[room].append(chosen)
