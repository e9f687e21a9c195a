"""Rows of a JSON file that is not one object per line: an array, an object that holds one, objects over many lines.

`json` reads a whole document at once. Here one value at a time is decoded from a growing buffer, so that an array takes
the memory of its largest row. An object that holds the array under a key is read whole, up to `MAX_VALUE`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

Layout = Literal["lines", "array", "values"]
HEAD = 1 << 20
"""Bytes that tell the layout."""
MAX_VALUE = 512 << 20
"""Characters of one row, or of an object that holds all rows."""
_NEAR_END = 16
"""Characters: an error this near the end of the buffer may be of a value that is there in part (`-Infin`, `\\u12`)."""
_SPACE = " \t\r\n"
BOM = "\ufeff"
COLUMNS = {"text", "messages", "prompt", "completion", "chosen", "rejected", "instruction"}
"""Keys that say that an object is a row."""


class JsonFault(ValueError):
    """Text that is not JSON, or not in a layout that can be read; `row` counts from 1."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(reason)
        self.row = row


def layout_of(head: bytes) -> Layout:
    """Return how a JSON file lays its rows out, by its first `HEAD` bytes: `lines` is one object per line."""
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
        stream: at `offset`.
        offset: 0, or what came with an earlier value.
        row: the number that came with it.

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
    """Pass over what separates values; whether no value follows."""
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
    """Return the rows that the only object of a file holds under one key; None where it is a row itself.

    It holds them where exactly one of its values is a list of objects that are no messages, and no key is a column's.
    """
    if not isinstance(value, dict) or value.keys() & COLUMNS:
        return None
    lists = [item for item in value.values() if _is_list(item, chat=False)]
    is_row = any(_is_list(item, chat=True) for item in value.values())
    return lists[0] if len(lists) == 1 and not is_row else None


def _is_list(value: Any, chat: bool) -> bool:
    """Whether it is a list of messages, or of other objects."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return any({"role", "from"} & item.keys() for item in value) == chat


class _Text:
    """The text of a stream, decoded as far as it is needed."""

    def __init__(self, stream: BinaryIO, offset: int, row: int) -> None:
        self.stream, self.offset, self.row = stream, offset, row
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.buffer, self.at, self.ended = "", 0, False

    def peek(self) -> str:
        """The next character; empty at the end."""
        while self.at == len(self.buffer) and not self.ended:
            self._more()
        return self.buffer[self.at : self.at + 1]

    def skip(self, characters: str) -> None:
        """Pass over the given characters."""
        while (next_one := self.peek()) and next_one in characters:
            self._advance(self.at + 1)

    def take(self, character: str) -> None:
        """Pass over one character, which is the next one."""
        self._advance(self.at + len(character))

    def value(self) -> Any:
        """The next value; the position is then after it."""
        self.row += 1
        while True:
            try:
                value, end = self.parse(self.buffer, self.at)
            except json.JSONDecodeError as error:
                self._wait_or_fail(error)
            except RecursionError as error:
                raise JsonFault(self.row, "malformed JSON: nested too deeply") from error
            else:
                self._advance(end)
                return value

    def _wait_or_fail(self, error: json.JSONDecodeError) -> None:
        """Read on where the value may be there in part only."""
        partial = error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer) - _NEAR_END
        if self.ended or not partial:
            raise JsonFault(self.row, f"malformed JSON: {error.msg}") from error
        if len(self.buffer) - self.at > MAX_VALUE:
            size = f"one JSON value is longer than {MAX_VALUE >> 20} Mi characters"
            raise JsonFault(self.row, f"{size}: write one object per line, or one array of them") from error
        self._more()

    def _more(self) -> None:
        """Read as much as there is, so that a long value is parsed few times; what was passed is let go."""
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
