"""Rows read and tokenised while training, endlessly, with a state that goes on at exactly the next row."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_api.problems import Problem
from finetune_trainer.data.encode import Columns, Encoder, Encoding, cut_blocks
from finetune_trainer.data.packing import pack
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import EmptyRow, Example, FormError, Kind, normalise
from finetune_trainer.data.row_kinds import row_kind
from finetune_trainer.data.sources import Cursor, Located, join_row, locate, source_rows
from finetune_trainer.errors import UserError
from finetune_trainer.form import form_of

WINDOW_ROWS, WINDOW_CHARACTERS = 1024, 32 << 20
FIRST_ROWS = 64
"""Rows that are looked at to tell a stream's form."""
PACKED_TOGETHER = 64
REMEMBERED = 8192
"""States kept of rows already handed out, for loaders that read ahead."""

State = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a stream stands after some rows: all that is needed to go on."""

    rows: int = 0
    """Rows handed out since the very start."""
    epoch: int = 0
    window: int = 0
    """Number of the window within the epoch."""
    start: Cursor = field(default_factory=Cursor)
    """Where the window's first row stands in the sources."""
    counted: int = 0
    """Rows of the table before the window, for the division among the ranks."""
    unit: int = 0
    """Rows of the shuffled window that are used up."""
    given: int = 0
    """Outputs of the next unit that have been handed out."""
    carry: tuple[int, ...] = ()
    """Tokens left over from the documents before."""

    @property
    def is_start_of_pass(self) -> bool:
        return not (self.counted or self.unit or self.given)


Steps = Generator[tuple[Place, Columns], None, Place]


class StreamedRows(IterableDataset[Columns]):
    """An endless stream of the rows that `prepare` would make, one rank's share of them.

    Row i of the table belongs to rank i mod world_size. Rows are shuffled within windows of 1024 (fewer, if they
    hold more than 32 Mi characters), anew in each pass. The state is small (positions and less than one block of
    tokens): on resuming, a file is opened at the window's first byte, and at most the window's rows are read again
    and one row (packed: 64 rows) is tokenised again. It is kept by the process that iterates, so a loader must have
    no worker processes.

    Raises:
        UserError: while iterating, from rows that can't be read or don't fit, and where a pass gives nothing.
    """

    def __init__(
        self,
        spec: DataSpec,
        tokenizer: PreTrainedTokenizerFast,
        encoding: Encoding,
        packed: bool,
        where: str,
        base_dir: Path,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.spec, self.tokenizer, self.encoding, self.packed = spec, tokenizer, encoding, packed
        self.where, self.base_dir, self.rank, self.world_size = where, base_dir, rank, world_size
        self._place = Place()
        self._ring: deque[Place] = deque([self._place], maxlen=REMEMBERED)

    def shard(self, rank: int, world_size: int) -> StreamedRows:
        """One rank's share of the same stream, from its start."""
        return StreamedRows(
            self.spec, self.tokenizer, self.encoding, self.packed, self.where, self.base_dir, rank, world_size
        )

    def first_forms(self) -> dict[str, int]:
        """Return how many of the stream's first rows have each form (`form.Form`).

        Raises:
            UserError: they can't be read.
        """
        rows = islice(table_rows(self.located(), self.spec, self.encoding.kind, self.where), FIRST_ROWS)
        return dict(Counter(form_of(row, bool(self.tokenizer.chat_template)) for row, _ in rows))

    def state_dict(self) -> State:
        """The state after the last row handed out, JSON-able."""
        return self._state(self._place)

    def state_at(self, rows: int) -> State:
        """The state after `rows` rows since the very start, of which at most the last 8192 are kept.

        Raises:
            KeyError: that state is not kept.
        """
        newest = self._place.rows
        back = newest - rows
        if not 0 <= back < len(self._ring):
            raise KeyError(f"no state after {rows} rows: kept are {newest - len(self._ring) + 1} to {newest}")
        return self._state(self._ring[-1 - back])

    def load_state_dict(self, state: State) -> None:
        """Go on from a state of a stream over the same data with as many ranks.

        Raises:
            ValueError: the state is of another rank or number of ranks.
        """
        if (state["rank"], state["world_size"]) != (self.rank, self.world_size):
            got = f"rank {state['rank']} of {state['world_size']}"
            raise ValueError(f"the state is of {got}, this stream is rank {self.rank} of {self.world_size}")
        fields = {name: state[name] for name in ("rows", "epoch", "window", "counted", "unit", "given")}
        self._place = Place(**fields, start=Cursor.from_json(state["start"]), carry=tuple(state["carry"]))
        self._ring = deque([self._place], maxlen=REMEMBERED)

    def _state(self, place: Place) -> State:
        values = {**vars(place), "start": place.start.to_json(), "carry": list(place.carry)}
        return {**values, "rank": self.rank, "world_size": self.world_size}

    def __iter__(self) -> Iterator[Columns]:
        for place, row in self._endless(self._place):
            self._place = place
            self._ring.append(place)
            yield {name: one if isinstance(one, str) else one.tolist() for name, one in row.items()}

    def _endless(self, place: Place) -> Steps:
        located = self.located()
        encoder = Encoder(self.tokenizer, self.encoding)
        while True:
            before = place
            place = yield from self._pass(located, encoder, place)
            if (place.rows, place.carry) == (before.rows, before.carry) and before.is_start_of_pass:
                raise UserError([Problem(self.where, f"a whole pass gives rank {self.rank} nothing to train on")])
            place = Place(place.rows, place.epoch + 1, carry=place.carry)

    def located(self) -> list[Located]:
        """Return the stream's sources with their files.

        Raises:
            UserError: some are missing.
        """
        located, problems = locate(self.spec, self.where, self.base_dir)
        if problems:
            raise UserError(problems)
        return located

    def _pass(self, located: list[Located], encoder: Encoder, place: Place) -> Steps:
        """The rest of one pass over the data."""
        table = table_rows(located, self.spec, self.encoding.kind, self.where, place.start)
        while window := _read_window(table):
            mine = [row for number, (row, _) in enumerate(window, place.counted) if self._is_mine(number)]
            place = yield from self._window(mine, encoder, place)
            counted, start = place.counted + len(window), window[-1][1]
            place = replace(place, window=place.window + 1, start=start, counted=counted, unit=0, given=0)
        return place

    def _is_mine(self, number: int) -> bool:
        return number % self.world_size == self.rank

    def _window(self, rows: list[Example], encoder: Encoder, place: Place) -> Steps:
        order = np.arange(len(rows))
        if self.spec.shuffle:
            order = np.random.default_rng([self.spec.seed, place.epoch, place.window]).permutation(len(rows))
        size = PACKED_TOGETHER if self.packed else 1
        for unit in range(place.unit, len(rows), size):
            made, carry = self._make([rows[index] for index in order[unit : unit + size]], encoder, place.carry)
            for given, row in enumerate(made[place.given :], place.given + 1):
                place = replace(place, rows=place.rows + 1, unit=unit, given=given)
                yield place, row
            place = replace(place, unit=unit + size, given=0, carry=carry)
        return place

    def _make(
        self, rows: list[Example], encoder: Encoder, carry: tuple[int, ...]
    ) -> tuple[list[Columns], tuple[int, ...]]:
        """All outputs of one unit, and the tokens left over."""
        if row_kind(self.encoding.kind).joined:
            start = np.array(carry, np.int32)
            blocks, rest = cut_blocks(
                [start, *encoder.documents([row["text"] for row in rows])], self.encoding.limit or 1
            )
            return [{"input_ids": block} for block in blocks], tuple(rest.tolist())
        stats = Stats()
        made = list(encoder.rows(enumerate(rows), stats))
        self._check(stats)
        return self._pack(made) if self.packed else made, ()

    def _pack(self, made: list[Columns]) -> list[Columns]:
        lengths = np.array([len(row["input_ids"]) for row in made], np.int64)
        return [_joined([made[index] for index in one]) for one in pack(lengths, self.encoding.limit or 0)]

    def _check(self, stats: Stats) -> None:
        problems = [Problem(self.where, reason) for _, reason in stats.faults]
        limit = self.encoding.limit
        hint = "set maxLength, or overflow: truncate or drop"
        problems += [
            Problem(self.where, f"an example of {length} tokens is longer than {limit}: {hint}")
            for _, length in stats.too_long
        ]
        if problems:
            raise UserError(problems)


def table_rows(
    located: list[Located], spec: DataSpec, kind: Kind, where: str, start: Cursor | None = None
) -> Iterator[tuple[Example, Cursor]]:
    """Normalised rows, each with the cursor after it.

    Every rank must see the same rows, so what a row is dropped for is decided here alone.

    Args:
        where: the spec's path, such as `stages[0].sft.data`.
        start: what to go on from. Default: the first row.

    Raises:
        UserError: while iterating, from rows that have another form than `kind` needs.
    """
    begin = start or Cursor()
    for index, one in enumerate(located[begin.source :], begin.source):
        path = f"{where}.sources[{index}]"
        first = begin if index == begin.source else Cursor(index)
        for row, cursor, place in source_rows(one, index, first, streaming=True):
            try:
                yield normalise(join_row(row, one, path), spec, kind), cursor
            except EmptyRow:
                continue
            except (FormError, UserError) as error:
                raise UserError([Problem(path, f"{place}: {error}")]) from error


def _read_window(table: Iterator[tuple[Example, Cursor]]) -> list[tuple[Example, Cursor]]:
    window: list[tuple[Example, Cursor]] = []
    characters = 0
    for row, cursor in islice(table, WINDOW_ROWS):
        window.append((row, cursor))
        characters += len(row.get("text", ""))
        if characters >= WINDOW_CHARACTERS:
            break
    return window


def _joined(rows: list[Columns]) -> Columns:
    columns = {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**columns, "seq_lengths": np.array([len(row["input_ids"]) for row in rows], np.int32)}
