"""Lists, hashes and reads the files of shared directories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from finetune_trainer.launch.sharing.records import SharedDirectory

DIGEST_BYTES = 32
_BLOCK_BYTES = 1 << 20
_HASH_THREADS = 4
_TEMPORARY_SUFFIXES = (".lock", ".part", ".incomplete")
"""Suffixes of files that other processes are still writing."""


@dataclass(frozen=True)
class Roots:
    """The roots of shared directories on this node: the job's cache and the Hugging Face cache."""

    cache: str
    hub: str

    def path_of(self, shared: SharedDirectory) -> Path:
        """Return the path of a shared directory on this node."""
        return Path(self.root_of(shared), shared.path)

    def root_of(self, shared: SharedDirectory) -> Path:
        """Return the root of a shared directory on this node."""
        return Path(self.cache if shared.root == "cache" else self.hub)


def local_roots(cache_dir: str) -> Roots:
    """Return the roots on this node."""
    from huggingface_hub import constants

    return Roots(cache_dir, constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class Entry:
    """A file or symbolic link of a shared directory."""

    path: str
    """Relative to the directory."""
    size: int
    """Bytes; 0 for a symbolic link."""
    digest: str = ""
    """BLAKE2b hash of the content, in hexadecimal digits."""
    link: str = ""
    """Target of a symbolic link."""


def list_entries(directory: Path) -> list[Entry]:
    """Return all files of a directory with their hashes. Links come last, so that their targets exist before them."""
    paths = sorted(path for path in directory.rglob("*") if _is_shared(path))
    files, links = [path for path in paths if not path.is_symlink()], [path for path in paths if path.is_symlink()]
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        digests = list(threads.map(file_digest, files))
    entries = [
        Entry(path.relative_to(directory).as_posix(), path.stat().st_size, digest)
        for path, digest in zip(files, digests, strict=True)
    ]
    return [*entries, *(Entry(path.relative_to(directory).as_posix(), 0, link=os.readlink(path)) for path in links)]


def _is_shared(path: Path) -> bool:
    """Whether a file is copied: temporary files and the cache files of `datasets` (`cache-*.arrow`) are not."""
    if path.is_symlink():
        return True
    temporary = path.suffix in _TEMPORARY_SUFFIXES or path.name.startswith((".", "cache-", "tmp"))
    return path.is_file() and not temporary


def file_digest(path: Path) -> str:
    """Return the BLAKE2b hash of a file's content, in hexadecimal digits."""
    hashed = blake2b(digest_size=DIGEST_BYTES)
    for block in _blocks(path):
        hashed.update(block)
    return hashed.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def read_chunk(directory: Path, path: str, offset: int, size: int) -> bytes:
    """Return up to `size` bytes of a file of a directory.

    Raises:
        ValueError: the path is outside the directory.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} is not a path below {directory}")
    with open(directory / path, "rb") as file:
        file.seek(offset)
        return file.read(size)
