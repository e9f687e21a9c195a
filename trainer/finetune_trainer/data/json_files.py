"""Read rows of a JSON file without one object per line: an array, an object with an array, objects over many lines.

`json` reads a whole document at once. This module decodes one value at a time from a growing buffer, so that an array
takes the memory of its largest row. An object that holds the array under a key is read whole, up to `MAX_VALUE`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

Layout = Literal["lines", "array", "values"]
HEAD = 1 << 20
"""Bytes at the start of a file from which the layout is determined."""
MAX_VALUE = 512 << 20
"""Maximum characters of one row, or of an object that holds all rows."""
_NEAR_END = 16
"""Characters: an error this close to the end of the buffer may come from an incomplete value (`-Infin`, `\\u12`)."""
_SPACE = " \t\r\n"
BOM = "\ufeff"
COLUMNS = {"text", "messages", "prompt", "completion", "chosen", "rejected", "instruction"}
"""Keys that identify an object as a row."""


class JsonFault(ValueError):
    """Text that is not JSON, or has an unknown layout; `row` counts from 1."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


def layout_of(head: bytes) -> Layout:
    """Return a JSON file's layout from its first `HEAD` bytes; `lines` means one object per line."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        return "array"
    first, _, rest = text.partition(b"\n")
    return "lines" if rest.strip() and _is_json(first) else "values"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_values(stream: BinaryIO, layout: Layout, offset: int, row: int) -> Iterator[tuple[Any, int, int]]:
    """Yield the values of a file, each with the offset after it and its number, from 1.

    Args:
        stream: positioned at `offset`.
        offset: 0, or the offset that came with an earlier value.
        row: the number that came with that value.

    Raises:
        JsonFault: the text is not JSON; an array does not end, or text follows its end.
    """
    text = _Text(stream, offset, row)
    array = layout == "array"
    if offset == 0:
        text.skip(BOM + _SPACE)
        text.take("[" if array else "")
    while not _at_end(text, array):
        yield text.value(), text.offset, text.row


def _at_end(text: _Text, array: bool) -> bool:
    """Skip the separator between values; return whether no value follows."""
    text.skip(_SPACE + "," if array else _SPACE)
    if not array or text.peek() not in ("", "]"):
        return not text.peek()
    if not text.peek():
        raise JsonFault(text.row, "the file ends before its array does")
    text.take("]")
    text.skip(_SPACE)
    if text.peek():
        raise JsonFault(text.row, "text follows the end of the array")
    return True


def rows_within(value: Any) -> list[Any] | None:
    """Return the rows that a file's only object holds under one key; None if the object is a row itself.

    It holds rows if exactly one value is a list of objects that are not messages and no key is a standard column.
    """
    if not isinstance(value, dict) or value.keys() & COLUMNS:
        return None
    lists = [item for item in value.values() if _is_list(item, chat=False)]
    is_row = any(_is_list(item, chat=True) for item in value.values())
    return lists[0] if len(lists) == 1 and not is_row else None


def _is_list(value: Any, chat: bool) -> bool:
    """Return whether a value is a list of messages (`chat`) or a list of other objects."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return any({"role", "from"} & item.keys() for item in value) == chat


class _Text:
    """The text of a stream, decoded on demand."""

    def __init__(self, stream: BinaryIO, offset: int, row: int) -> None:
        self.stream, self.offset, self.row = stream, offset, row
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.buffer, self.at, self.ended = "", 0, False

    def peek(self) -> str:
        """Return the next character; '' at the end."""
        while self.at == len(self.buffer) and not self.ended:
            self._more()
        return self.buffer[self.at : self.at + 1]

    def skip(self, characters: str) -> None:
        """Skip any of the characters."""
        while (next_one := self.peek()) and next_one in characters:
            self._advance(self.at + 1)

    def take(self, character: str) -> None:
        """Skip one character, which must be the next one."""
        self._advance(self.at + len(character))

    def value(self) -> Any:
        """Return the next value and move after it."""
        self.row += 1
        while True:
            try:
                value, end = self.parse(self.buffer, self.at)
            except json.JSONDecodeError as error:
                self._read_more_or_fail(error)
            except RecursionError as error:
                raise JsonFault(self.row, "malformed JSON: nested too deeply") from error
            else:
                self._advance(end)
                return value

    def _read_more_or_fail(self, error: json.JSONDecodeError) -> None:
        """Read more if the value may be incomplete, else raise."""
        partial = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - _NEAR_END
        if self.ended or not partial:
            raise JsonFault(self.row, f"malformed JSON: {error.msg}") from error
        if len(self.buffer) - self.at > MAX_VALUE:
            size = f"one JSON value is longer than {MAX_VALUE >> 20} Mi characters"
            raise JsonFault(self.row, f"{size}: write one object per line, or one array of them") from error
        self._more()

    def _more(self) -> None:
        """Double the buffer, so that a long value is parsed only a few times, and drop the text before `at`."""
        self.buffer, self.at = self.buffer[self.at :], 0
        block = self.stream.read(max(HEAD, len(self.buffer)))
        self.ended = not block
        try:
            self.buffer += self.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise JsonFault(self.row, f"not UTF-8 text: {error.reason}") from error

    def _advance(self, end: int) -> None:
        passed = self.buffer[self.at : end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self.at = end
