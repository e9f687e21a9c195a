"""Hash the data that a stage trains on.

Prepared rows are hashed by their tokens in order. Names, directories and formats of files do not matter: data is the
same if it gives the same tokens. A stream is not read ahead, so it is hashed by its sources.
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
"""Size in bytes and number of the blocks of a streamed file that are hashed, spread over the file."""
HASHED_FILES = 64
"""Maximum number of a stream's files whose content is hashed; the sizes of all files are hashed."""


def tokens_hash(directory: Path) -> str:
    """Return the hash of all columns of prepared rows, in order, independent of their Arrow batches."""
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
    """Return the hash of all settings and sources that determine a stream's rows.

    Files are hashed by size and some blocks, in order, without their names; a change of the same length elsewhere is
    not detected. A hub dataset is hashed by the job's revision.
    """
    sources = [_source(one) for one in located]
    settings = [reading_fields(spec, excluded=set()), vars(encoding), packed, tokenizer_parts(tokenizer)]
    return hash_of(FORMAT_VERSION, sources, *settings)


def _source(located: Located) -> Any:
    others = set() if located.source.hub else HUB_FIELDS
    return [*source_fields(located, FILES_FOUND_BY | others), _files(located.files)]


def _files(files: list[DataFile]) -> list[list[Any]]:
    """Return format and size of each file, and the hash of some blocks of at most `HASHED_FILES` of them."""
    every = max(1, -(-len(files) // HASHED_FILES))
    return [[file.format, *_file(file, hash_content=number % every == 0)] for number, file in enumerate(files)]


def _file(file: DataFile, hash_content: bool) -> list[Any]:
    fs, path = fsspec.core.url_to_fs(file.url)
    size = int(fs.size(path))
    if not hash_content:
        return [size]
    starts = sorted({max(0, (size - BLOCK) * number // (BLOCKS - 1)) for number in range(BLOCKS)})
    blocks = [fs.cat_file(path, start=start, end=min(start + BLOCK, size)) for start in starts]
    return [size, blake2b(b"".join(blocks), digest_size=16).hexdigest()]
