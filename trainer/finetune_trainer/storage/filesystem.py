"""A directory in storage: a local path or any URI that fsspec supports."""

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
"""Timeout of an outage of a remote storage, after which the job fails."""
TRANSFERS = 4
"""Files that are transferred in parallel; the parts of each large file are transferred in parallel too."""
_PART = ".part"
T = TypeVar("T")


class Storage:
    """Files below one root. Paths are relative to the root, with forward slashes.

    Every method raises OSError if storage refuses the operation, or if an outage exceeds the timeout.

    Args:
        root: a path or a URI.
        retry_seconds: timeout of an outage of a remote storage in seconds.
        options: options of fsspec's file system.

    Raises:
        UserError: fsspec does not support the URI.
    """

    def __init__(self, root: str, *, retry_seconds: float = OUTAGE_SECONDS, **options: Any) -> None:
        try:
            self.fs, path = fsspec.core.url_to_fs(mounted(root), **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"{root} can't be opened: {error}") from error
        self.root = str(path).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._retry_seconds = 0.0 if self.is_local else retry_seconds

    def path(self, relative: str) -> str:
        """Return the full path in the file system."""
        return f"{self.root}/{relative}" if relative else self.root

    def local(self, relative: str) -> Path | None:
        """Return the path on this machine, or None if the storage is remote."""
        return Path(self.path(relative)) if self.is_local else None

    def exists(self, relative: str) -> bool:
        return bool(self._retried(lambda: self._fresh().exists(self.path(relative)), f"looking for {relative}"))

    def read_text(self, relative: str) -> str:
        """Return the content of a file; raise FileNotFoundError if it does not exist."""
        return self.read_bytes(relative).decode()

    def read_bytes(self, relative: str) -> bytes:
        """Return the content of a file; raise FileNotFoundError if it does not exist."""
        return self._retried(lambda: bytes(self.fs.cat_file(self.path(relative))), f"reading {relative}")

    def read_range(self, relative: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` (exclusive) of a file, or fewer if the file is shorter.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        path = self.path(relative)
        return self._retried(lambda: bytes(self.fs.cat_file(path, start=start, end=end)), f"reading {relative}")

    def write_text(self, relative: str, text: str) -> None:
        """Write a file atomically: a reader sees the old content or the new one."""
        self.write_bytes(relative, text.encode())

    def write_bytes(self, relative: str, content: bytes) -> None:
        """Write a file atomically: a reader sees the old content or the new one."""
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
        """Return the names in a directory, sorted; empty if it does not exist."""
        try:
            entries = self._retried(lambda: self._fresh().ls(self.path(relative), detail=False), f"listing {relative}")
        except FileNotFoundError:
            return []
        paths = (str(entry).rstrip("/") for entry in entries)
        # Some S3 servers (SeaweedFS) keep a directory whose files are deleted and list it as its own only entry.
        return sorted(path.rsplit("/", 1)[-1] for path in paths if path != self.path(relative))

    def sizes(self, relative: str) -> dict[str, int]:
        """Return the sizes in bytes of all files below a directory, by path relative to it."""
        base = self.path(relative)
        found = self._retried(lambda: self._fresh().find(base, detail=True), f"listing {relative}")
        return {str(path)[len(base) + 1 :]: int(info["size"]) for path, info in found.items() if str(path) != base}

    def delete(self, relative: str) -> None:
        """Delete a file or a directory tree, if it exists."""
        try:
            self._retried(lambda: self._fresh().rm(self.path(relative), recursive=True), f"deleting {relative}")
        except FileNotFoundError:
            return

    def drop_uploads(self, relative: str) -> int:
        """Abort unfinished multipart uploads below a directory and return their number.

        S3 keeps, and bills, their parts until they are aborted. Google Cloud Storage deletes them by itself. Without
        permission to list them, they are left to the lifecycle rules of the bucket.
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
        """Copy files of a local directory to a directory in storage.

        Args:
            local: the local directory.
            relative: the directory in storage.
            names: paths of the files in the local directory. Default: all.
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

        _in_parallel(send, names)

    def download(self, relative: str, local: Path) -> Path:
        """Return a local directory with exactly the files of a directory in storage; that directory itself if local.

        Several processes may do so at the same time: each file appears atomically. Files that were downloaded before
        and whose metadata in storage (size, modification time, ETag) has not changed are not downloaded again.
        """
        if self.is_local:
            return Path(self.path(relative))
        versions = self._versions(relative)
        for path in local.rglob("*") if local.exists() else ():
            if path.is_file() and path.suffix != _PART and path.relative_to(local).as_posix() not in versions:
                path.unlink(missing_ok=True)
        local.mkdir(parents=True, exist_ok=True)
        record = DownloadRecord(local)
        missing = [name for name, version in versions.items() if not record.has(name, version)]

        def receive(name: str) -> None:
            self._receive(f"{relative}/{name}" if relative else name, local / name)
            record.add(name, versions[name])

        _in_parallel(receive, missing)
        return local

    def _versions(self, relative: str) -> dict[str, str]:
        """Return a hash of the metadata of each file below a directory, by path relative to it."""
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
        """Return the file system with an empty cache of listings, because other machines write to it too."""
        self.fs.invalidate_cache()
        return self.fs

    def _retried(self, work: Callable[[], T], what: str) -> T:
        return call_with_retries(work, f"{self.root}: {what}", self._retry_seconds)


def _in_parallel(work: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(max_workers=TRANSFERS) as threads:
        for _ in threads.map(work, names):
            pass
