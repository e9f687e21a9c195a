"""Keys of the cache: equal exactly where the prepared data would be equal."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_trainer.data.encode import Encoding
from finetune_trainer.data.readers import TEXT_PIECE, DataFile
from finetune_trainer.data.row_formats import Kind
from finetune_trainer.data.sources import Located, hub_dataset

FORMAT_VERSION = 2
"""Raised with every change of what is written, or of what a row means."""
WHOLE, SAMPLE, SAMPLES = 64 << 20, 1 << 20, 16


def digest(*values: Any) -> str:
    """A short hash of JSON values, another one with every `FORMAT_VERSION`."""
    return hash_of(FORMAT_VERSION, *values)


def hash_of(*values: Any) -> str:
    """A short hash of JSON values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def rows_key(located: list[Located], spec: DataSpec, kind: Kind) -> str:
    """Key of a spec's table: contents of its files and how rows are read from them, not how they are shuffled."""
    names = ("columns", "template", "transcript")
    return digest(kind, TEXT_PIECE, [_source(one) for one in located], *(_json(getattr(spec, name)) for name in names))


def prepared_key(drawn: dict[str, list[str]], encoding: Encoding, packed: bool, tokenizer: str) -> str:
    """Key of a stage's prepared data: which rows of which tables, and how they become tokens."""
    return digest(drawn, vars(encoding), packed, tokenizer)


def content_digest(indices: NDArray[np.int64]) -> str:
    """Hash of which rows are drawn, in order."""
    return hashlib.blake2b(indices.tobytes(), digest_size=16).hexdigest()


def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of all that decides about tokens: the tokenizer's serialization, its chat template and special tokens."""
    return digest(*tokenizer_parts(tokenizer))


def tokenizer_parts(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Hash of a tokenizer's serialization and special tokens, and hash of its chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    return hash_of(parts, tokenizer.special_tokens_map), hash_of(tokenizer.chat_template)


def _json(value: Any) -> Any:
    return None if value is None else value.to_json()


def _source(located: Located) -> Any:
    source = located.source
    files = [[file.format, content_hash(file)] for file in located.files]
    fingerprint = hub_dataset(source, streaming=False)._fingerprint if source.hub else None
    return [files, fingerprint, source.inline, located.joined and [source.join and source.join.key, located.joined]]


def content_hash(file: DataFile) -> str:
    """Hash of a file's bytes. Of one over 64 MiB: of its size, its time of change (local) or tag (elsewhere) and 16
    blocks of 1 MiB spread over it, so that a key costs no whole pass over large data."""
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
