"""Write prepared rows as Arrow files, one per task, and read them as one memory-mapped dataset."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from finetune_trainer.data.packing import pack

BATCH_TOKENS = 1 << 18
SHARDS = "[0-9]*.arrow"
"""Pattern of shards in their directory, where `datasets` writes its caches too (`cache-....arrow`)."""
Columns = dict[str, Any]


def write_shard(path: Path, rows: Iterable[Columns]) -> int:
    """Write rows of int32 lists and texts as an Arrow stream in batches of `BATCH_TOKENS`; no rows write no file.

    Returns:
        the number of rows.
    """
    count = 0
    writer = None
    for batch in _batches(rows):
        table = record_batch(batch)
        writer = writer or pa.ipc.new_stream(str(path), table.schema)
        writer.write_batch(table)
        count += len(batch)
    if writer is not None:
        writer.close()
    return count


def record_batch(rows: list[Columns]) -> pa.RecordBatch:
    """Return rows as Arrow columns of type list<int32>, and large_string for texts."""
    return pa.RecordBatch.from_pydict({name: _column([row[name] for row in rows]) for name in rows[0]})


def _column(values: list[Any]) -> pa.Array:
    return pa.array(values, pa.large_string()) if isinstance(values[0], str) else _lists(values)


def _lists(values: list[Any]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(value) for value in values)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(values).astype(np.int32))


def _batches(rows: Iterable[Columns]) -> Iterator[list[Columns]]:
    batch: list[Columns] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += sum(len(value) for value in row.values())
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def read_shards(directory: Path) -> Dataset | None:
    """Return all shards of a directory, in order of name, as one memory-mapped dataset; None if there are none."""
    paths = sorted(directory.glob(SHARDS))
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths]) if paths else None


def pack_shards(sources: list[Path], target: Path, capacity: int) -> int:
    """Pack the examples of shards into rows of at most `capacity` tokens; write one shard and return its row count."""
    readable = [path for path in sources if path.exists()]
    if not readable:
        return 0
    table = pa.concat_tables([pa.ipc.open_stream(pa.OSFile(str(path))).read_all() for path in readable])
    return write_shard(target, _packed(table.combine_chunks(), capacity))


def _packed(table: pa.Table, capacity: int) -> Iterator[Columns]:
    ids, labels = (table[name].chunk(0) for name in ("input_ids", "labels"))
    ends = ids.offsets.to_numpy()
    lengths = np.diff(ends).astype(np.int64)
    all_ids, all_labels = ids.values.to_numpy(), labels.values.to_numpy()
    for one in pack(lengths, capacity):
        spans = [slice(ends[index], ends[index + 1]) for index in one]
        yield {
            "input_ids": np.concatenate([all_ids[span] for span in spans]),
            "labels": np.concatenate([all_labels[span] for span in spans]),
            "seq_lengths": lengths[one],
        }
