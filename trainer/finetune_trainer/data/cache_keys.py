"""Cache keys of prepared data: equal if and only if the prepared data is equal.

Keys are derived from all fields of the specs except those listed here, so that a field that is added later cannot reuse
data that was prepared without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Set
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_api.base import Json
from finetune_api.data import DataSpec
from finetune_trainer.data.encode import Encoding
from finetune_trainer.data.readers import TEXT_PIECE, DataFile
from finetune_trainer.data.row_formats import Kind
from finetune_trainer.data.sources import Located, hub_dataset

FORMAT_VERSION = 3
"""Incremented with every change of the files' format or of the meaning of a row."""
ROWS_CHOSEN_BY = {"limit", "validation_split", "shuffle", "seed", "streaming"}
"""Fields of a `DataSpec` that select and order the rows of a table, and do not change its contents."""
FILES_FOUND_BY = {"file", "directory", "uri", "stage", "format"}
"""Fields of a `DataSource` that locate its files, whose contents and formats are part of the key."""
HUB_FIELDS = {"hub", "subset", "split", "revision"}
"""Fields of a `DataSource` that select a dataset on the Hub."""
WHOLE, SAMPLE, SAMPLES = 64 << 20, 1 << 20, 16


def digest(*values: Any) -> str:
    """Return a short hash of JSON values, a different one for each `FORMAT_VERSION`."""
    return hash_of(FORMAT_VERSION, *values)


def hash_of(*values: Any) -> str:
    """Return a short hash of JSON values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rows_key(located: list[Located], spec: DataSpec, kind: Kind) -> str:
    """Return the key of a spec's table, from the contents of its files and the settings for reading rows."""
    return digest(kind, TEXT_PIECE, [_source(one) for one in located], reading_fields(spec, ROWS_CHOSEN_BY))


def reading_fields(spec: DataSpec, excluded: Set[str]) -> Json:
    """Return all fields of a data spec by name, without its sources and the excluded ones, as JSON values."""
    return spec.model_dump(mode="json", exclude={"sources", *excluded})


def source_fields(located: Located, excluded: Set[str]) -> list[Any]:
    """Return all fields of a data source by name, without the excluded ones, and the joined table, as JSON values.

    A joined table is identified by its contents, not by its file.
    """
    source = located.source
    fields = source.model_dump(mode="json", exclude={*excluded, "join"})
    join = source.join and source.join.model_dump(mode="json", exclude={"file", "format"})
    return [fields, located.joined and [join, located.joined]]


def prepared_key(drawn: dict[str, list[str]], encoding: Encoding, packed: bool, tokenizer: str) -> str:
    """Return the key of a stage's prepared data, from the rows of its tables, the encoding and the tokenizer."""
    return digest(drawn, vars(encoding), packed, tokenizer)


def content_digest(indices: NDArray[np.int64]) -> str:
    """Return the hash of row indices, in order."""
    return hashlib.blake2b(indices.tobytes(), digest_size=16).hexdigest()


def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the hash of a tokenizer's serialization, its chat template and its special tokens."""
    return digest(*tokenizer_parts(tokenizer))


def tokenizer_parts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Return the hash of a tokenizer's serialization and special tokens, and the hash of its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return hash_of(parts, tokenizer.special_tokens_map), hash_of(tokenizer.chat_template)


def _source(located: Located) -> Any:
    files = [[file.format, content_hash(file)] for file in located.files]
    fingerprint = hub_dataset(located.source, streaming=False)._fingerprint if located.source.hub else None
    return [files, fingerprint, *source_fields(located, FILES_FOUND_BY | HUB_FIELDS)]


def content_hash(file: DataFile) -> str:
    """Return the hash of a file's bytes.

    Of a file over 64 MiB, hash its size, its modification time (local) or tag (remote) and 16 evenly spaced blocks of
    1 MiB, to avoid reading all of it.
    """
    fs, path = fsspec.core.url_to_fs(file.url)
    size = int(fs.size(path))
    seen = hashlib.blake2b(digest_size=16)
    if size <= WHOLE:
        with fs.open(path, "rb") as stream:
            while block := stream.read(SAMPLE):
                seen.update(block)
        return seen.hexdigest()
    seen.update(f"{size} {os.stat(path).st_mtime_ns if os.path.exists(path) else fs.ukey(path)}".encode())
    for number in range(SAMPLES):
        start = (size - SAMPLE) * number // (SAMPLES - 1)
        seen.update(fs.cat_file(path, start=start, end=start + SAMPLE))
    return seen.hexdigest()
