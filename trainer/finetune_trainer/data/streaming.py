"""Read and tokenize rows during training as an endless stream, with a state that resumes at exactly the next row."""

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
"""Number of rows from which a stream's form is determined."""
PACKED_TOGETHER = 64
KEPT_STATES = 8192
"""Number of recent states that are kept, for data loaders that prefetch."""

State = dict[str, Any]


@dataclass(frozen=True)
class ReadPosition:
    """The position of a stream after some rows, from which it can resume."""

    rows: int = 0
    """Number of rows yielded since the beginning."""
    epoch: int = 0
    window: int = 0
    """Index of the window within the epoch."""
    start: Cursor = field(default_factory=Cursor)
    """Position of the window's first row in the sources."""
    counted: int = 0
    """Number of table rows before the window, for the division among the ranks."""
    unit: int = 0
    """Number of rows of the shuffled window that are done."""
    given: int = 0
    """Number of outputs of the next unit that were yielded."""
    carry: tuple[int, ...] = ()
    """Tokens left over from previous documents."""

    @property
    def is_start_of_pass(self) -> bool:
        """Return whether no row of the current pass was read."""
        return not (self.counted or self.unit or self.given)


Steps = Generator[tuple[ReadPosition, Columns], None, ReadPosition]


class StreamedRows(IterableDataset[Columns]):
    """An endless stream of one rank's share of the rows that `prepare` would make.

    Row i of the table belongs to rank i mod world_size. Rows are shuffled within windows of 1024 (fewer, if they
    hold more than 32 Mi characters), differently in each pass. The state is small (positions and less than one block of
    tokens): on resuming, a file is opened at the window's first byte, at most the window's rows are read again, and one
    row (packed: 64 rows) is tokenized again. The iterating process keeps the state, so a data loader must not use
    worker processes.

    Raises:
        UserError: while iterating: rows can't be read or are too long, or a whole pass yields nothing.
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
        self._position = ReadPosition()
        self._recent: deque[ReadPosition] = deque([self._position], maxlen=KEPT_STATES)

    def shard(self, rank: int, world_size: int) -> StreamedRows:
        """Return one rank's share of the same stream, from its start."""
        return StreamedRows(
            self.spec, self.tokenizer, self.encoding, self.packed, self.where, self.base_dir, rank, world_size
        )

    def first_forms(self) -> dict[str, int]:
        """Return the number of the stream's first rows by form (`form.Form`).

        Raises:
            UserError: they can't be read.
        """
        rows = islice(table_rows(self.located(), self.spec, self.encoding.kind, self.where), FIRST_ROWS)
        return dict(Counter(form_of(row, bool(self.tokenizer.chat_template)) for row, _ in rows))

    def state_dict(self) -> State:
        """Return the state after the last yielded row, as JSON values."""
        return self._state(self._position)

    def state_at(self, rows: int) -> State:
        """Return the state after `rows` rows since the beginning; the last 8192 states are kept.

        Raises:
            KeyError: that state is not kept.
        """
        newest = self._position.rows
        back = newest - rows
        if not 0 <= back < len(self._recent):
            raise KeyError(f"no state after {rows} rows: kept are {newest - len(self._recent) + 1} to {newest}")
        return self._state(self._recent[-1 - back])

    def load_state_dict(self, state: State) -> None:
        """Resume from a state of a stream over the same data with the same number of ranks.

        Raises:
            ValueError: the state is of another rank or number of ranks.
        """
        if (state["rank"], state["world_size"]) != (self.rank, self.world_size):
            got = f"rank {state['rank']} of {state['world_size']}"
            raise ValueError(f"the state is of {got}, this stream is rank {self.rank} of {self.world_size}")
        fields = {name: state[name] for name in ("rows", "epoch", "window", "counted", "unit", "given")}
        self._position = ReadPosition(**fields, start=Cursor.from_json(state["start"]), carry=tuple(state["carry"]))
        self._recent = deque([self._position], maxlen=KEPT_STATES)

    def _state(self, position: ReadPosition) -> State:
        values = {**vars(position), "start": position.start.to_json(), "carry": list(position.carry)}
        return {**values, "rank": self.rank, "world_size": self.world_size}

    def __iter__(self) -> Iterator[Columns]:
        for position, row in self._endless(self._position):
            self._position = position
            self._recent.append(position)
            yield {name: one if isinstance(one, str) else one.tolist() for name, one in row.items()}

    def _endless(self, position: ReadPosition) -> Steps:
        located = self.located()
        encoder = Encoder(self.tokenizer, self.encoding)
        while True:
            before = position
            position = yield from self._pass(located, encoder, position)
            if (position.rows, position.carry) == (before.rows, before.carry) and before.is_start_of_pass:
                raise UserError([Problem(self.where, f"a whole pass gives rank {self.rank} nothing to train on")])
            position = ReadPosition(position.rows, position.epoch + 1, carry=position.carry)

    def located(self) -> list[Located]:
        """Return the stream's sources with their files.

        Raises:
            UserError: some are missing.
        """
        located, problems = locate(self.spec, self.where, self.base_dir)
        if problems:
            raise UserError(problems)
        return located

    def _pass(self, located: list[Located], encoder: Encoder, position: ReadPosition) -> Steps:
        """Yield the rest of one pass over the data."""
        table = table_rows(located, self.spec, self.encoding.kind, self.where, position.start)
        while window := _read_window(table):
            mine = [row for number, (row, _) in enumerate(window, position.counted) if self._is_mine(number)]
            position = yield from self._window(mine, encoder, position)
            counted, start = position.counted + len(window), window[-1][1]
            position = replace(position, window=position.window + 1, start=start, counted=counted, unit=0, given=0)
        return position

    def _is_mine(self, number: int) -> bool:
        return number % self.world_size == self.rank

    def _window(self, rows: list[Example], encoder: Encoder, position: ReadPosition) -> Steps:
        order = np.arange(len(rows))
        if self.spec.shuffle:
            order = np.random.default_rng([self.spec.seed, position.epoch, position.window]).permutation(len(rows))
        size = PACKED_TOGETHER if self.packed else 1
        for unit in range(position.unit, len(rows), size):
            picked = [rows[index] for index in order[unit : unit + size]]
            outputs, carry = self._encode_unit(picked, encoder, position.carry)
            for given, row in enumerate(outputs[position.given :], position.given + 1):
                position = replace(position, rows=position.rows + 1, unit=unit, given=given)
                yield position, row
            position = replace(position, unit=unit + size, given=0, carry=carry)
        return position

    def _encode_unit(
        self, rows: list[Example], encoder: Encoder, carry: tuple[int, ...]
    ) -> tuple[list[Columns], tuple[int, ...]]:
        """Return all outputs of one unit, and the tokens left over."""
        if row_kind(self.encoding.kind).joined:
            start = np.array(carry, np.int32)
            blocks, rest = cut_blocks(
                [start, *encoder.documents([row["text"] for row in rows])], self.encoding.limit or 1
            )
            return [{"input_ids": block} for block in blocks], tuple(rest.tolist())
        stats = Stats()
        outputs = list(encoder.rows(enumerate(rows), stats))
        self._check(stats)
        return self._pack(outputs) if self.packed else outputs, ()

    def _pack(self, outputs: list[Columns]) -> list[Columns]:
        lengths = np.array([len(row["input_ids"]) for row in outputs], np.int64)
        return [_joined([outputs[index] for index in one]) for one in pack(lengths, self.encoding.limit or 0)]

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
    """Yield normalized rows, each with the cursor after it.

    Every rank must see the same rows, so only this function drops rows.

    Args:
        where: the spec's path, such as `stages[0].sft.data`.
        start: the cursor at which to start. Default: the first row.

    Raises:
        UserError: while iterating: a row does not have the format that `kind` needs.
    """
    begin = start or Cursor()
    for index, one in enumerate(located[begin.source :], begin.source):
        path = f"{where}.sources[{index}]"
        first = begin if index == begin.source else Cursor(index)
        for row, cursor, location in source_rows(one, index, first, streaming=True):
            try:
                yield normalise(join_row(row, one, path), spec, kind), cursor
            except EmptyRow:
                continue
            except (FormError, UserError) as error:
                raise UserError([Problem(path, f"{location}: {error}")]) from error


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
