"""A directory in storage: a local path or any URI that fsspec knows, behind one narrow class."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from finetune_api.claims import mounted
from finetune_trainer.errors import UserError
from finetune_trainer.storage.download_record import DownloadRecord, remote_version
from finetune_trainer.storage.retry import call_with_retries

OUTAGE_SECONDS = 600.0
"""How long a remote store may be away before a job that waits for it fails."""
TRANSFERS = 4
"""Files on their way at once; each large one goes in parts that do so, too."""
_PART = ".part"
T = TypeVar("T")


class Storage:
    """Files below one root. Paths are relative to it, with forward slashes.

    Raises:
        OSError: from every method, where the store refuses, or a remote one was away for longer than its patience.
    """

    def __init__(self, root: str, *, patience: float = OUTAGE_SECONDS, **options: Any) -> None:
        """`patience` in seconds; `options` are those of fsspec's file system.

        Raises:
            UserError: no library knows such a store.
        """
        try:
            self.fs, path = fsspec.core.url_to_fs(mounted(root), **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"{root} can't be reached: {error}") from error
        self.root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._patience = 0.0 if self.is_local else patience

    def path(self, relative: str) -> str:
        """The path as the file system knows it."""
        return f"{self.root}/{relative}" if relative else self.root

    def local(self, relative: str) -> Path | None:
        """The path on this machine, or None where the store is elsewhere."""
        return Path(self.path(relative)) if self.is_local else None

    def exists(self, relative: str) -> bool:
        return bool(self._retried(lambda: self._fresh().exists(self.path(relative)), f"looking for {relative}"))

    def read_text(self, relative: str) -> str:
        """Raises FileNotFoundError where there is no such file."""
        return self.read_bytes(relative).decode()

    def read_bytes(self, relative: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        return self._retried(lambda: bytes(self.fs.cat_file(self.path(relative))), f"reading {relative}")

    def read_range(self, relative: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end` of a file, fewer where it ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = self.path(relative)
        return self._retried(lambda: bytes(self.fs.cat_file(path, start=start, end=end)), f"reading {relative}")

    def write_text(self, relative: str, text: str) -> None:
        """Write a whole file at once: a reader sees the old one or the new one, never a part."""
        self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, content: bytes) -> None:
        """As `write_text`."""
        path = self.path(relative)
        if not self.is_local:
            self._retried(lambda: self.fs.pipe_file(path, content), f"writing {relative}")
            return
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex[:8]}{_PART}"
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def names(self, relative: str) -> list[str]:
        """Names in a directory, sorted; none where it does not exist."""
        try:
            entries = self._retried(lambda: self._fresh().ls(self.path(relative), detail=False), f"listing {relative}")
        except FileNotFoundError:
            return []
        paths = (str(entry).rstrip("/") for entry in entries)
        # Some S3 servers (SeaweedFS) keep a directory whose files are deleted, and list it as its own only entry.
        return sorted(path.rsplit("/", 1)[-1] for path in paths if path != self.path(relative))

    def sizes(self, relative: str) -> dict[str, int]:
        """Sizes in bytes of all files below a directory, by path relative to it."""
        base = self.path(relative)
        found = self._retried(lambda: self._fresh().find(base, detail=True), f"listing {relative}")
        return {str(path)[len(base) + 1 :]: int(info["size"]) for path, info in found.items() if str(path) != base}

    def delete(self, relative: str) -> None:
        """Delete a file or a directory with all in it; nothing where it does not exist."""
        try:
            self._retried(lambda: self._fresh().rm(self.path(relative), recursive=True), f"deleting {relative}")
        except FileNotFoundError:
            return

    def drop_uploads(self, relative: str) -> int:
        """Abort the uploads in parts that began below a directory and never ended; returns how many there were.

        S3 keeps their parts, and bills them, until somebody does. Google's end by themselves. Who may not list them
        leaves them to the bucket's own rules.
        """
        if "s3" not in self.fs.protocol:
            return 0
        bucket, _, key = self.path(relative).partition("/")
        try:
            return self._retried(lambda: self._abort_uploads(bucket, f"{key}/"), f"aborting uploads of {relative}")
        except PermissionError:
            return 0

    def _abort_uploads(self, bucket: str, prefix: str) -> int:
        found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads") or []
        for upload in found:
            self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(found)

    def upload(self, local: Path, relative: str, names: list[str] | None = None) -> None:
        """Copy a local directory's files into one in storage.

        Args:
            names: paths of the files in the directory. Default: all.
        """
        if self.is_local and names is None:
            shutil.copytree(local, self.path(relative), dirs_exist_ok=True)
            return
        if names is None:
            names = [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()]

        def send(name: str) -> None:
            target = self.path(f"{relative}/{name}")
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
            self._retried(lambda: self.fs.put_file(str(local / name), target), f"uploading {relative}/{name}")

        _all_of(send, names)

    def download(self, relative: str, local: Path) -> Path:
        """Return a local directory with just the files of one in storage: itself where that is local already.

        Several processes may do so at once: each file appears whole. Files that were fetched before, and are the same
        in storage by all that it says of them (size, time of change, tag), are not fetched again.
        """
        if self.is_local:
            return Path(self.path(relative))
        states = self._states(relative)
        for path in local.rglob("*") if local.exists() else ():
            if path.is_file() and path.suffix != _PART and path.relative_to(local).as_posix() not in states:
                path.unlink(missing_ok=True)
        local.mkdir(parents=True, exist_ok=True)
        fetched = DownloadRecord(local)
        lacking = [name for name, state in states.items() if not fetched.has(name, state)]

        def receive(name: str) -> None:
            self._receive(f"{relative}/{name}" if relative else name, local / name)
            fetched.add(name, states[name])

        _all_of(receive, lacking)
        return local

    def _states(self, relative: str) -> dict[str, str]:
        """Return what the store says of each file below a directory, as a hash."""
        base = self.path(relative)
        found = self._retried(lambda: self._fresh().find(base, detail=True), f"listing {relative}")
        return {str(path)[len(base) + 1 :]: remote_version(info) for path, info in found.items() if str(path) != base}

    def _receive(self, relative: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{_PART}")
        try:
            self._retried(lambda: self.fs.get_file(self.path(relative), str(part)), f"downloading {relative}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _fresh(self) -> Any:
        """The file system without what it remembers of listings: other machines write there, too."""
        self.fs.invalidate_cache()
        return self.fs

    def _retried(self, work: Callable[[], T], what: str) -> T:
        return call_with_retries(work, f"{self.root}: {what}", self._patience)


def _all_of(work: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(max_workers=TRANSFERS) as threads:
        for _ in threads.map(work, names):
            pass
