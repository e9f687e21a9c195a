"""Records which files of a directory in storage were downloaded, so that no process of a node repeats it."""

from __future__ import annotations

import json
import threading
import uuid
from hashlib import blake2b
from pathlib import Path
from typing import Any


def remote_version(info: dict[str, Any]) -> str:
    """Return a hash of a file's metadata in storage: size, modification time, ETag."""
    text = json.dumps({str(name): str(value) for name, value in info.items()}, sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


class DownloadRecord:
    """The record of a local directory. It is a file next to the directory, written after each download."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory.with_name(f".{directory.name}.fetched.json")
        self._lock = threading.Lock()
        self._entries = self._read()

    def _read(self) -> dict[str, list[Any]]:
        try:
            entries: dict[str, list[Any]] = json.loads(self._path.read_text())
            return entries
        except (OSError, ValueError):
            return {}

    def has(self, name: str, version: str) -> bool:
        """Whether a file was downloaded in this version and the local copy has not changed since."""
        return self._entries.get(name) == [version, *_local_version(self.directory / name)]

    def add(self, name: str, version: str) -> None:
        """Record a downloaded file. Records of other processes that download into the directory are kept."""
        with self._lock:
            self._entries = self._read() | self._entries | {name: [version, *_local_version(self.directory / name)]}
            part = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}.part")
            part.write_text(json.dumps(self._entries))
            part.replace(self._path)


def _local_version(path: Path) -> list[int]:
    """Return size and modification time of a local file; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
