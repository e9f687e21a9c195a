"""Hashes of what a stage trains on.

The hash of prepared rows is of their tokens in order. Where the rows lie and what their files are called does not
count, and neither does a file's format: it is the same data if the same tokens come of it. A stream is known by its
sources, because it is not read ahead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from finetune_api.data import DataSpec
from finetune_trainer.data.cache_keys import (
    FILES_FOUND_BY,
    FORMAT_VERSION,
    HUB_FIELDS,
    hash_of,
    reading_fields,
    source_fields,
    tokenizer_parts,
)
from finetune_trainer.data.encode import Encoding
from finetune_trainer.data.readers import DataFile
from finetune_trainer.data.shards import SHARDS
from finetune_trainer.data.sources import Located

BLOCK, BLOCKS = 64 << 10, 3
"""Of a streamed file, so many blocks of so many bytes are hashed, spread over it."""
HASHED_FILES = 64
"""Of a stream of more files, so many are looked into; of all of them the sizes count."""


def tokens_hash(directory: Path) -> str:
    """Return the hash of all columns of prepared rows, in order, whatever Arrow batches they are written in."""
    seen = blake2b(digest_size=16)
    for path in sorted(directory.glob(SHARDS)):
        table = pa.ipc.open_stream(pa.OSFile(str(path))).read_all().combine_chunks()
        for name in table.column_names:
            seen.update(name.encode())
            for part in _bytes(table[name]):
                seen.update(part)
    return seen.hexdigest()


def _bytes(column: pa.ChunkedArray) -> Iterator[bytes]:
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type):
            yield np.diff(chunk.offsets.to_numpy()).astype(np.int64).tobytes()
            yield chunk.flatten().to_numpy().tobytes()
        else:
            yield json.dumps(chunk.to_pylist()).encode()


def stream_hash(spec: DataSpec, located: list[Located], encoding: Encoding, packed: bool, tokenizer: Any) -> str:
    """Return the hash of what decides about a stream's rows. A file's name does not, but the order of the files does.

    Files are known by their sizes and by some of their blocks, so a change of the same length elsewhere goes unseen. A
    hub dataset is known by the revision that the job gives.
    """
    sources = [_source(one) for one in located]
    how = [reading_fields(spec, excluded=set()), vars(encoding), packed, tokenizer_parts(tokenizer)]
    return hash_of(FORMAT_VERSION, sources, *how)


def _source(located: Located) -> Any:
    others = set() if located.source.hub else HUB_FIELDS
    return [*source_fields(located, FILES_FOUND_BY | others), _files(located.files)]


def _files(files: list[DataFile]) -> list[list[Any]]:
    """Return format and size of each file, and the hash of some blocks of at most `HASHED_FILES` of them."""
    every = max(1, -(-len(files) // HASHED_FILES))
    return [[file.format, *_file(file, looked_into=number % every == 0)] for number, file in enumerate(files)]


def _file(file: DataFile, looked_into: bool) -> list[Any]:
    fs, path = fsspec.core.url_to_fs(file.url)
    size = int(fs.size(path))
    if not looked_into:
        return [size]
    starts = sorted({max(0, (size - BLOCK) * number // (BLOCKS - 1)) for number in range(BLOCKS)})
    blocks = [fs.cat_file(path, start=start, end=min(start + BLOCK, size)) for start in starts]
    return [size, blake2b(b"".join(blocks), digest_size=16).hexdigest()]
