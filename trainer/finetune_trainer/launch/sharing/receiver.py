"""Copies a shared directory to this node in chunks, verifies it by hash, and resumes an interrupted copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from finetune_trainer.launch.sharing.files import Entry, Roots, file_digest
from finetune_trainer.launch.sharing.records import SharedDirectory

Read = Callable[[SharedDirectory, str, int, int], bytes]
"""Reads a chunk: directory, path of the file in it, offset and size in bytes."""
_PART = ".part"


class Receiver:
    """Copies shared directories to this node.

    Args:
        roots: roots of this node.
        read: reads a chunk from the node or the storage that has the directory.
        chunk: chunk size in bytes.
        streams: files to copy in parallel, and so the number of chunks in memory.
    """

    def __init__(self, roots: Roots, read: Read, chunk: int, streams: int) -> None:
        self.roots, self.read, self.chunk, self.streams = roots, read, chunk, streams

    def receive(self, shared: SharedDirectory, entries: Callable[[], Iterable[Entry]]) -> int:
        """Copy a directory and return the number of bytes copied; 0 if it exists, as on a shared volume.

        A directory of the job's cache appears atomically. One of the Hugging Face cache may exist in part; then only
        its missing files are copied.

        Args:
            shared: the directory.
            entries: returns the files of the directory; called only if something must be copied.

        Raises:
            OSError: a file arrived damaged twice, or the node or the storage does not respond.
        """
        target = self.roots.path_of(shared)
        if shared.root == "cache" and target.is_dir():
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.incoming") if shared.root == "cache" else target
        with FileLock(f"{staging}.lock"):
            if shared.root == "cache" and target.is_dir():
                return 0
            count = self._receive_files(shared, staging, list(entries()))
            if staging != target:
                os.rename(staging, target)
        return count

    def _receive_files(self, shared: SharedDirectory, directory: Path, entries: list[Entry]) -> int:
        directory.mkdir(parents=True, exist_ok=True)
        files = [entry for entry in entries if not entry.link]
        with ThreadPoolExecutor(self.streams) as threads:
            count = sum(threads.map(lambda entry: self._receive_file(shared, directory, entry), files))
        for entry in entries:
            if entry.link:
                _link(directory / entry.path, entry.link)
        return count

    def _receive_file(self, shared: SharedDirectory, directory: Path, entry: Entry) -> int:
        """Copy a file unless it exists. One that arrives damaged is copied once more from its start."""
        target = directory / entry.path
        if target.is_file() and target.stat().st_size == entry.size:
            return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        part, count = target.with_name(target.name + _PART), 0
        for _ in range(2):
            count += self._append(shared, part, entry)
            if file_digest(part) == entry.digest:
                part.replace(target)
                return count
            part.unlink()
        raise OSError(f"{target}: arrived damaged twice (its hash is not that of the file on the other node)")

    def _append(self, shared: SharedDirectory, part: Path, entry: Entry) -> int:
        """Fetch the missing end of a partial file and return its size in bytes."""
        have = part.stat().st_size if part.exists() else 0
        if have > entry.size:
            part.unlink()
            have = 0
        with open(part, "ab") as file:
            for offset in range(have, entry.size, self.chunk):
                content = self.read(shared, entry.path, offset, min(self.chunk, entry.size - offset))
                file.write(content)
                if len(content) < min(self.chunk, entry.size - offset):
                    break  # the file has shrunk; the hash will differ
        return max(entry.size - have, 0)


def _link(path: Path, target: str) -> None:
    if path.is_symlink() and os.readlink(path) == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
