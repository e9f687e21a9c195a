"""Write every paid answer to disk before it is used, so that no request is paid for twice after a crash."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer.endpoint.chat import ChatAnswer
from finetune_trainer.storage.filesystem import Storage

PART_BYTES = 4 << 20
"""Size at which a part is closed, which limits how much is uploaded repeatedly to a remote store."""
PUSH_SECONDS = 2.0
"""Interval at which the growing part is uploaded to a remote store."""


class Journal:
    """An append-only log of answers by the key of their request, in parts below one directory of storage.

    A run never appends to a part of an earlier run: an incomplete last line after a crash is ignored. If storage is
    remote, parts are written on this machine first and uploaded as they grow.

    Args:
        directory: in storage, such as `stages/00-synthesize/journal`.
        writer: a number that is unique among the processes that write at the same time.
        scratch: a directory on this machine, used if storage is remote.

    Raises:
        OSError: from every method, if a file can't be read or written.
    """

    def __init__(self, storage: Storage, directory: str, scratch: Path, writer: int = 0) -> None:
        self._storage, self._directory, self._writer = storage, directory, writer
        self._local = storage.local(directory) or scratch / "journal"
        self._local.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, ChatAnswer] = dict(self._read())
        self.found = len(self.answers)
        """Number of answers from earlier attempts."""
        self._number = max(self._numbers(), default=-1)
        self._file: int | None = None
        self._size = self._written = self._synced = 0
        self._pushed = (-1, 0)
        self._file_lock, self._sync_lock = threading.Lock(), asyncio.Lock()

    def record(self, key: str, answer: ChatAnswer) -> None:
        """Write an answer, so that it survives a crash of this process. `sync` makes it survive one of the machine."""
        line = json.dumps({"key": key} | answer.to_json(), ensure_ascii=False).encode() + b"\n"
        with self._file_lock:
            if self._file is None or self._size >= PART_BYTES:
                self._begin_part()
            assert self._file is not None
            _write_all(self._file, line)
            self._size += len(line)
            self._written += 1
        self.answers[key] = answer

    def sync(self) -> None:
        """Flush all answers to disk, and upload new ones to a remote store."""
        with self._file_lock:
            written = self._written
            if self._file is not None:
                os.fsync(self._file)
            self._synced = max(self._synced, written)
        self.push()

    async def synced(self) -> None:
        """Wait until all recorded answers are on disk; concurrent callers share one `fsync`."""
        wanted = self._written
        async with self._sync_lock:
            if self._synced < wanted:
                await asyncio.to_thread(self._sync_file)

    def push(self) -> None:
        """Upload the growing part to a remote store."""
        if self._storage.is_local or self._file is None:
            return
        with self._file_lock:
            mark, name = (self._number, self._size), self._name(self._number)
            content = (self._local / name).read_bytes() if mark != self._pushed else b""
        if content:
            self._storage.write_bytes(f"{self._directory}/{name}", content)
            self._pushed = mark

    async def keep_pushing(self) -> None:
        """Upload the growing part periodically, until cancelled."""
        while not self._storage.is_local:
            await asyncio.sleep(PUSH_SECONDS)
            await asyncio.to_thread(self.push)

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _sync_file(self) -> None:
        with self._file_lock:
            written, file = self._written, self._file
            if file is not None:
                os.fsync(file)
            self._synced = max(self._synced, written)

    def _begin_part(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            name = self._name(self._number)
            if not self._storage.is_local:
                self._storage.write_bytes(f"{self._directory}/{name}", (self._local / name).read_bytes())
        self._number, self._size = self._number + 1, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL
        self._file = os.open(self._local / self._name(self._number), flags, 0o644)

    def _name(self, number: int) -> str:
        return f"{self._writer:03d}-{number:05d}.jsonl"

    def _numbers(self) -> Iterator[int]:
        for name in {*os.listdir(self._local), *self._storage.names(self._directory)}:
            writer, _, rest = name.removesuffix(".jsonl").partition("-")
            if writer == f"{self._writer:03d}" and rest.isdigit():
                yield int(rest)

    def _read(self) -> Iterator[tuple[str, ChatAnswer]]:
        contents = [path.read_bytes() for path in sorted(self._local.glob("*.jsonl"))]
        if not self._storage.is_local:
            names = self._storage.names(self._directory)
            contents += [self._storage.read_bytes(f"{self._directory}/{name}") for name in names]
        for content in contents:
            yield from _entries(content)


def _entries(content: bytes) -> Iterator[tuple[str, ChatAnswer]]:
    """Yield the entries in the complete lines of a part."""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            value = json.loads(line)
            yield value["key"], ChatAnswer.from_json(value)
        except (ValueError, KeyError, TypeError):
            continue


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
