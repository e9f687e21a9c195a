"""A directory in storage: a local path or any URI that fsspec knows, behind one narrow class."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Storage:
    """Files below one root. Paths are relative to it, with forward slashes.

    Raises:
        OSError: from every method, where the store can't be reached or refuses.
    """

    def __init__(self, root: str, **options: Any) -> None:
        self.fs, path = fsspec.core.url_to_fs(root, **options)
        self.root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, relative: str) -> str:
        """The path as the file system knows it."""
        return f"{self.root}/{relative}" if relative else self.root

    def local(self, relative: str) -> Path | None:
        """The path on this machine, or None where the store is elsewhere."""
        return Path(self.path(relative)) if self.is_local else None

    def exists(self, relative: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(relative)))

    def read_text(self, relative: str) -> str:
        """Raises FileNotFoundError where there is no such file."""
        return self.read_bytes(relative).decode()

    def read_bytes(self, relative: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        return bytes(self.fs.cat_file(self.path(relative)))

    def write_text(self, relative: str, text: str) -> None:
        """Write a whole file at once: a reader sees the old one or the new one, never a part."""
        self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, content: bytes) -> None:
        """As `write_text`."""
        path = self.path(relative)
        if not self.is_local:
            self.fs.pipe_file(path, content)
            return
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def names(self, relative: str) -> list[str]:
        """Names in a directory, sorted; none where it does not exist."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(relative), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def sizes(self, relative: str) -> dict[str, int]:
        """Sizes in bytes of all files below a directory, by path relative to it."""
        self.fs.invalidate_cache()
        base = self.path(relative)
        found = self.fs.find(base, detail=True)
        return {str(path)[len(base) + 1 :]: int(info["size"]) for path, info in found.items()}

    def delete(self, relative: str) -> None:
        """Delete a file or a directory with all in it; nothing where it does not exist."""
        try:
            self.fs.rm(self.path(relative), recursive=True)
        except FileNotFoundError:
            return

    def upload(self, local: Path, relative: str) -> None:
        """Copy a local directory's files into one in storage."""
        if self.is_local:
            shutil.copytree(local, self.path(relative), dirs_exist_ok=True)
        else:
            self.fs.put(f"{local}/", f"{self.path(relative)}/", recursive=True)

    def download(self, relative: str, local: Path) -> Path:
        """A local directory with the files of one in storage: itself where that is local already."""
        if self.is_local:
            return Path(self.path(relative))
        local.mkdir(parents=True, exist_ok=True)
        self.fs.get(f"{self.path(relative)}/", f"{local}/", recursive=True)
        return local
