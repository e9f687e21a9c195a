"""Store the normalized rows of a data spec on disk, for random access without holding them in memory."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_trainer.data.row_formats import EmptyRow, Example, FormError, Kind, normalise
from finetune_trainer.data.sources import Located, join_row, source_rows
from finetune_trainer.errors import UserError

MAX_FAULTS = 5


class RowStore:
    """JSON rows in one file and the offsets of their ends; each read is one `pread`.

    A memory-mapped table is not used: its touched pages count as resident memory, and a shuffled pass touches them all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ends: NDArray[np.int64] = np.fromfile(directory / "ends.i64", np.int64)
        self.dropped: dict[str, int] = json.loads((directory / "dropped.json").read_text())
        self._file = os.open(directory / "rows.jsonl", os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def bytes(self) -> int:
        """Return the size of all rows in bytes."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def sizes(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the size in bytes of each of the rows."""
        starts = np.where(indices > 0, self.ends[indices - 1], 0)
        return self.ends[indices] - starts

    def __getitem__(self, index: int) -> Example:
        start = int(self.ends[index - 1]) if index else 0
        row: Example = json.loads(os.pread(self._file, int(self.ends[index]) - start, start))
        return row


def store_rows(
    directory: Path, located: list[Located], spec: DataSpec, kind: Kind, where: str, log: Callable[[str], None]
) -> RowStore:
    """Return the table in `directory`; the first process that needs it builds it.

    Raises:
        UserError: rows can't be read, joined or parsed; the first five are named.
    """
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            log(f"reading {where}")
            _build_once(directory, located, spec, kind, where)
    return RowStore(directory)


def _build_once(directory: Path, located: list[Located], spec: DataSpec, kind: Kind, where: str) -> None:
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        _build(partial, located, spec, kind, where)
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(directory: Path, located: list[Located], spec: DataSpec, kind: Kind, where: str) -> None:
    faults: list[Problem] = []
    dropped: Counter[str] = Counter()
    end = 0
    with open(directory / "rows.jsonl", "wb") as rows, open(directory / "ends.i64", "wb") as ends:
        for example in _examples(located, spec, kind, where, faults, dropped):
            line = json.dumps(example, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
            end += len(line)
            rows.write(line)
            ends.write(end.to_bytes(8, "little"))
            if len(faults) >= MAX_FAULTS:
                break
    if faults:
        raise UserError(faults)
    if not end:
        raise UserError([Problem(where, "the data has no rows" + (f" to use: {dict(dropped)}" if dropped else ""))])
    (directory / "dropped.json").write_text(json.dumps(dropped))


def _examples(
    located: list[Located], spec: DataSpec, kind: Kind, where: str, faults: list[Problem], dropped: Counter[str]
) -> Iterator[Example]:
    for index, one in enumerate(located):
        path = f"{where}.sources[{index}]"
        for row, _, location in source_rows(one, index):
            try:
                yield normalise(join_row(row, one, path), spec, kind)
            except EmptyRow as reason:
                dropped[str(reason)] += 1
            except FormError as error:
                faults.append(Problem(path, f"{location}: {error}"))
            except UserError as error:
                faults += [Problem(problem.path, f"{location}: {problem.message}") for problem in error.problems]
            if len(faults) >= MAX_FAULTS:
                return


def order_rows(count: int, spec: DataSpec, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of training rows and of held-out rows, in order.

    The table is permuted by `seed` (if `shuffle`) and cut to `limit`, and a share of it, at least one row, is drawn for
    evaluation.

    Raises:
        UserError: there are too few rows to hold any out.
    """
    order = np.random.default_rng([spec.seed, 0]).permutation(count) if spec.shuffle else np.arange(count)
    order = order[: spec.limit].astype(np.int64)
    if not spec.validation_split:
        return order, order[:0]
    if len(order) < 2:
        raise UserError([Problem(f"{where}.validationSplit", "there is 1 row, so none can be held out: set evalData")])
    held = min(max(1, round(len(order) * spec.validation_split)), len(order) - 1)
    out = np.zeros(len(order), bool)
    out[np.random.default_rng([spec.seed, 1]).permutation(len(order))[:held]] = True
    return order[~out], order[out]


def cut_tasks(sizes: NDArray[np.int64], max_bytes: int, max_rows: int) -> list[slice]:
    """Return slices of about `max_bytes` and at most `max_rows` rows: the units of parallel work."""
    if not len(sizes):
        return []
    by_bytes = (np.cumsum(sizes) - sizes) // max_bytes
    by_rows = np.arange(len(sizes)) // max_rows
    changes = np.flatnonzero(np.diff(by_bytes) | np.diff(by_rows)) + 1
    return [slice(start, stop) for start, stop in pairwise([0, *changes.tolist(), len(sizes)])]
