"""Tokenize normalised rows: the encoder that the kinds of rows (`row_kinds`) share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.chat import ChatFormat, Encoded
from finetune_trainer.data.plain_text import PlainFrame
from finetune_trainer.data.prompts import prompt_of
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import Example, Kind, Message
from finetune_trainer.data.row_kinds import IDENTICAL, IGNORED, NOTHING, TOO_LONG, UNANSWERED, Columns, row_kind
from finetune_trainer.data.template import ChatError, Tools

__all__ = [
    "IDENTICAL",
    "IGNORED",
    "NOTHING",
    "TOO_LONG",
    "UNANSWERED",
    "Columns",
    "Encoder",
    "Encoding",
    "Ids",
    "cut_blocks",
]

Ids = list[int]
Tokens = NDArray[np.int32]
TEXT_BATCH = 256 * 1024


@dataclass(frozen=True)
class Encoding:
    """How a stage's rows are tokenized. `limit` is the maximum length in tokens, for text the block size."""

    kind: Kind
    limit: int | None
    overflow: str = "error"
    trained_share: float = 1.0


class Encoder:
    """Tokenizes the rows of one stage."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> None:
        self.encoding = encoding
        self.chat = ChatFormat(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.frame = PlainFrame(tokenizer)

    def rows(self, rows: Iterable[tuple[int, Example]], stats: Stats) -> Iterator[Columns]:
        """Yield the columns of each row to keep, and count all rows in `stats`.

        Raises:
            LookupError: the encoding's kind of rows is unknown.
        """
        encode = row_kind(self.encoding.kind).encode
        if encode is None:
            yield from self.blocks((example["text"] for _, example in rows), stats)
            return
        for number, example in rows:
            stats.rows += 1
            try:
                yield from encode(self, number, example, stats)
            except ChatError as error:
                stats.faults.append((number, str(error)))

    def blocks(self, texts: Iterable[str], stats: Stats) -> Iterator[Columns]:
        """Yield blocks of the concatenated documents, each with its end-of-text token; the remainder is dropped."""
        size = self.encoding.limit or 1
        rest: Tokens = np.zeros(0, np.int32)
        for batch in _batches(texts):
            stats.rows += len(batch)
            stats.kept += len(batch)
            documents = self.documents(batch)
            stats.longest = max(stats.longest, *(len(document) for document in documents))
            blocks, rest = cut_blocks([rest, *documents], size)
            for block in blocks:
                self._count_block(stats, size)
                yield {"input_ids": block}
        stats.dropped_tokens += len(rest)

    def documents(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each text, with the special tokens before and after it."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(self.frame.whole(encoding.ids), np.int32) for encoding in encodings]

    def _count_block(self, stats: Stats, size: int) -> None:
        share = self.encoding.trained_share
        stats.tokens += size
        stats.trained_tokens += size - 1 if share == 1 else round(size * share)

    def prompt(self, example: Example) -> Ids:
        """Return the tokens of a dialogue up to the start of its last answer, the same as in training.

        Raises:
            ChatError: the chat template rejects the conversation, or there is none.
        """
        asked = prompt_of(example) or {}
        if "messages" not in asked:
            return self._opening(asked["prompt"])
        if example.get("templated") and self.chat.template is None:
            return self._opening("\n\n".join(message["content"] for message in asked["messages"]))
        return self.prompt_ids(asked["messages"], example.get("tools"))

    def dialogue(self, example: Example) -> Encoded:
        """Return the tokens of a dialogue and its loss mask.

        Raises:
            ChatError: the chat template rejects the conversation, or there is none.
        """
        if "text" in example:
            ids = self._plain(example["text"])
            return Encoded(ids, [], [1] * len(ids))
        if "messages" in example:
            return self.chat.conversation(example["messages"], example.get("tools"))
        prompt, completion = self.texts(example, "completion")
        return self._reply(prompt, completion, example.get("tools"))

    def answers(self, example: Example, names: Sequence[str], stats: Stats) -> tuple[Ids, list[tuple[Ids, Ids]]]:
        """Return the tokens of a prompt, and the tokens and loss mask of each of its answers.

        The prompt ends where the answers, each tokenized together with the prompt, start to differ.

        Args:
            names: keys of the answers in the example.

        Raises:
            ChatError: the chat template rejects the conversation, or there is none.
        """
        prompt, *answers = self.texts(example, *names)
        plain = isinstance(prompt, str)
        sides = [self._reply(prompt, answer, example.get("tools")) for answer in answers]
        stats.note({note for side in sides for note in side.notes})
        start = min(side.prompt for side in sides)
        shared = min([start, *(_common_prefix(sides[0].ids[:start], side.ids) for side in sides[1:])])
        # In plain text every token after the shared prompt has loss: the prompt's last token may differ by answer.
        masks = [[1] * len(side.ids) if plain else side.mask for side in sides]
        return sides[0].ids[:shared], [
            (side.ids[shared:], mask[shared:]) for side, mask in zip(sides, masks, strict=True)
        ]

    def texts(self, example: Example, *names: str) -> list[Any]:
        """Return the prompt and the named answers of an example.

        Conversations made by `template` become plain strings if the tokenizer has no chat template.
        """
        values = [example["prompt"], *(example[name] for name in names)]
        if not example.get("templated") or self.chat.template is not None:
            return values
        return ["\n\n".join(message["content"] for message in value) for value in values]

    def may_cut(self, number: int, length: int, stats: Stats) -> bool:
        """Return whether a row that is too long may be truncated; if not, count it as too long or dropped.

        Args:
            number: index of the row.
            length: length of the row in tokens.
        """
        if self.encoding.overflow == "error":
            stats.too_long.append((number, length))
        elif self.encoding.overflow == "drop":
            stats.drop(TOO_LONG, length)
        return self.encoding.overflow == "truncate"

    def whole(self, prompt: str | list[Message], answer: str | list[Message], tools: Tools = None) -> Ids:
        """Return the tokens of a prompt and its answer as in training, end token included.

        Raises:
            ChatError: the chat template rejects them.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            return self._plain(prompt + answer)
        assert isinstance(answer, list)
        return self.chat.reply(prompt, answer, tools).ids

    def prompt_ids(self, prompt: str | list[Message], tools: Tools = None) -> Ids:
        """Return the tokens of a prompt, up to the start of its answer.

        Raises:
            ChatError: it is a conversation and the chat template rejects it, or there is none.
        """
        return self._opening(prompt) if isinstance(prompt, str) else self._ids(self.chat.prompt(prompt, tools))

    def _reply(self, prompt: Any, answer: Any, tools: Tools) -> Encoded:
        """Return the tokens of a prompt with its answer; only the answer has loss."""
        if not isinstance(prompt, str):
            return self.chat.reply(prompt, answer, tools)
        ids = self._plain(prompt + answer)
        start = _common_prefix(self._opening(prompt), ids)
        return Encoded(ids, [], [0] * start + [1] * (len(ids) - start), prompt=start)

    def _opening(self, text: str) -> Ids:
        return self.frame.opened(self._ids(text))

    def _plain(self, text: str) -> Ids:
        return self.frame.whole(self._ids(text))

    def _ids(self, text: str) -> Ids:
        ids: Ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids


def cut_blocks(tokens: list[Tokens], size: int) -> tuple[Tokens, Tokens]:
    """Return the concatenated tokens as blocks [n, size], and the remainder."""
    joined = np.concatenate(tokens)
    full = len(joined) // size * size
    return joined[:full].reshape(-1, size), joined[full:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of about `TEXT_BATCH` characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TEXT_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Return the number of tokens that two sequences share from their start."""
    return len(commonprefix([first, second]))  # noqa: RUF071 (of sequences, not of paths)
