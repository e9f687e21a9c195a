"""What a local directory has of one in storage, so that no process of a node fetches it again."""

from __future__ import annotations

import json
import threading
import uuid
from hashlib import blake2b
from pathlib import Path
from typing import Any


def remote_version(info: dict[str, Any]) -> str:
    """Return a hash of all that a store says of a file: size, time of change, tag."""
    text = json.dumps({str(name): str(value) for name, value in info.items()}, sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


class DownloadRecord:
    """The record of a directory. It lies next to the directory and is written after each file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory.with_name(f".{directory.name}.fetched.json")
        self._lock = threading.Lock()
        self._states = self._read()

    def _read(self) -> dict[str, list[Any]]:
        try:
            found: dict[str, list[Any]] = json.loads(self._path.read_text())
            return found
        except (OSError, ValueError):
            return {}

    def has(self, name: str, state: str) -> bool:
        """Whether a file is here as it was fetched, and the same in storage as then."""
        return self._states.get(name) == [state, *_here(self.directory / name)]

    def add(self, name: str, state: str) -> None:
        """Record a file that was fetched. Records of other processes that fetch into the directory are kept."""
        with self._lock:
            self._states = self._read() | self._states | {name: [state, *_here(self.directory / name)]}
            part = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}.part")
            part.write_text(json.dumps(self._states))
            part.replace(self._path)


def _here(path: Path) -> list[int]:
    """Return size and time of change of a local file, which tell whether it was changed since it was fetched."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]
