"""Copy a directory to this node in chunks: verified by hash, resumed where an earlier try broke off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from finetune_trainer.launch.sharing.files import Entry, Roots, digest_of
from finetune_trainer.launch.sharing.records import Place

Read = Callable[[Place, str, int, int], bytes]
"""Reads a chunk: place, path in it, offset and size in bytes."""
_PART = ".part"


class Receiver:
    """Copies directories.

    Args:
        read: reads a chunk on the node, or in the store, that has the directory.
        chunk: bytes of a chunk.
        streams: files on their way at once, and so the chunks that are in memory at once.
    """

    def __init__(self, roots: Roots, read: Read, chunk: int, streams: int) -> None:
        self.roots, self.read, self.chunk, self.streams = roots, read, chunk, streams

    def receive(self, place: Place, entries: Callable[[], Iterable[Entry]]) -> int:
        """Copy a directory, and return how many bytes travelled; 0 where it is here, as on a shared volume.

        A directory of the cache appears whole. One of the hub's cache may exist in part, and gets the files it lacks.

        Args:
            entries: returns what the directory holds; called where it is needed.

        Raises:
            OSError: a file came damaged twice, or the node or the store with it went away.
        """
        target = self.roots.of(place)
        if place.root == "cache" and target.is_dir():
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.incoming") if place.root == "cache" else target
        with FileLock(f"{staging}.lock"):
            if place.root == "cache" and target.is_dir():
                return 0
            count = self._receive_files(place, staging, list(entries()))
            if staging != target:
                os.rename(staging, target)
        return count

    def _receive_files(self, place: Place, directory: Path, entries: list[Entry]) -> int:
        directory.mkdir(parents=True, exist_ok=True)
        files = [entry for entry in entries if not entry.link]
        with ThreadPoolExecutor(self.streams) as threads:
            count = sum(threads.map(lambda entry: self._receive_file(place, directory, entry), files))
        for entry in entries:
            if entry.link:
                _link(directory / entry.path, entry.link)
        return count

    def _receive_file(self, place: Place, directory: Path, entry: Entry) -> int:
        """Copy a file that is not here yet. One that comes damaged is fetched once more, from its start."""
        target = directory / entry.path
        if target.is_file() and target.stat().st_size == entry.size:
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        part, count = target.with_name(target.name + _PART), 0
        for _ in range(2):
            count += self._append(place, part, entry)
            if digest_of(part) == entry.digest:
                part.replace(target)
                return count
            part.unlink()
        raise OSError(f"{target}: came damaged twice (its hash is not that of the file on the other node)")

    def _append(self, place: Place, part: Path, entry: Entry) -> int:
        """Fetch what a partial file lacks; return how many bytes that was."""
        have = part.stat().st_size if part.exists() else 0
        if have > entry.size:
            part.unlink()
            have = 0
        with open(part, "ab") as file:
            for offset in range(have, entry.size, self.chunk):
                content = self.read(place, entry.path, offset, min(self.chunk, entry.size - offset))
                file.write(content)
                if len(content) < min(self.chunk, entry.size - offset):
                    break  # the file has shrunk: its hash says so
        return max(entry.size - have, 0)


def _link(path: Path, target: str) -> None:
    if path.is_symlink() and os.readlink(path) == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
