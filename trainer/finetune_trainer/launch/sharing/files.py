"""Directories that travel between nodes, and what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from finetune_trainer.launch.sharing.records import Place

DIGEST_BYTES = 32
_BLOCK = 1 << 20
_HASHES = 4
"""Files that are hashed at once."""
_PASSING = (".lock", ".part", ".incomplete")
"""Endings of files that other processes write for a while."""


@dataclass(frozen=True)
class Roots:
    """Where the directories lie on this node: the job's cache, and the Hugging Face hub's."""

    cache: str
    hub: str

    def of(self, place: Place) -> Path:
        """Return the directory of a place."""
        return Path(self.root_of(place), place.path)

    def root_of(self, place: Place) -> Path:
        """Return the directory that a place lies below."""
        return Path(self.cache if place.root == "cache" else self.hub)


def roots_here(cache_dir: str) -> Roots:
    """Return this node's directories."""
    from huggingface_hub import constants

    return Roots(cache_dir, constants.HF_HUB_CACHE)


@dataclass(frozen=True)
class Entry:
    """A file, by its path in the directory. `digest` is the BLAKE2b hash of its bytes, in hexadecimal digits."""

    path: str
    size: int
    digest: str = ""
    link: str = ""
    """Target of a symbolic link, which has no bytes of its own."""


def entries_of(directory: Path) -> list[Entry]:
    """Return all files of a directory with their hashes; links come last, so that none leads nowhere."""
    paths = sorted(path for path in directory.rglob("*") if _travels(path))
    files, links = [path for path in paths if not path.is_symlink()], [path for path in paths if path.is_symlink()]
    with ThreadPoolExecutor(_HASHES) as threads:
        digests = list(threads.map(digest_of, files))
    named = [
        Entry(path.relative_to(directory).as_posix(), path.stat().st_size, digest)
        for path, digest in zip(files, digests, strict=True)
    ]
    return [*named, *(Entry(path.relative_to(directory).as_posix(), 0, link=os.readlink(path)) for path in links)]


def _travels(path: Path) -> bool:
    """`datasets` keeps caches of its own (`cache-*.arrow`) next to the files that it reads."""
    if path.is_symlink():
        return True
    passing = path.suffix in _PASSING or path.name.startswith((".", "cache-", "tmp"))
    return path.is_file() and not passing


def digest_of(path: Path) -> str:
    """Return the hash of a file's bytes."""
    seen = blake2b(digest_size=DIGEST_BYTES)
    for block in _blocks(path):
        seen.update(block)
    return seen.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def read_chunk(directory: Path, path: str, offset: int, size: int) -> bytes:
    """Return up to `size` bytes of a file of the directory.

    Raises:
        ValueError: the path leads out of the directory.
    """
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} is no path in {directory}")
    with open(directory / path, "rb") as file:
        file.seek(offset)
        return file.read(size)
