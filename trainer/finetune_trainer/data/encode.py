"""From normalised rows to tokens: one small function per kind of stage, over the rows of one task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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
from finetune_trainer.data.template import ChatError, Tools

Ids = list[int]
Tokens = NDArray[np.int32]
Columns = dict[str, Any]
IGNORED = -100
TOO_LONG, NOTHING, IDENTICAL = "too long", "nothing to learn", "identical pair"
UNANSWERED = "no assistant turn"
TEXT_BATCH = 256 * 1024


@dataclass(frozen=True)
class Encoding:
    """How a stage's rows become tokens. `limit` is in tokens; for text it is the block's length."""

    kind: Kind
    limit: int | None
    overflow: str = "error"
    trained_share: float = 1.0


class Encoder:
    """A tokenizer at work for one stage."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> None:
        self.encoding = encoding
        self.chat = ChatFormat(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.frame = PlainFrame(tokenizer)

    def rows(self, rows: Iterable[tuple[int, Example]], stats: Stats) -> Iterator[Columns]:
        """Columns of each row to keep; `stats` counts what happened."""
        if self.encoding.kind == "text":
            yield from self.blocks((example["text"] for _, example in rows), stats)
            return
        make = {"sft": self._sft, "prompt": self._prompt}.get(self.encoding.kind, self._preference)
        for number, example in rows:
            stats.rows += 1
            try:
                yield from make(number, example, stats)
            except ChatError as error:
                stats.faults.append((number, str(error)))

    def blocks(self, texts: Iterable[str], stats: Stats) -> Iterator[Columns]:
        """Documents joined, each with its end-of-text token, and cut into blocks; the rest is dropped."""
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
        """Tokens of each text, with what goes before and after it."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(self.frame.whole(encoding.ids), np.int32) for encoding in encodings]

    def _count_block(self, stats: Stats, size: int) -> None:
        share = self.encoding.trained_share
        stats.tokens += size
        stats.trained_tokens += size - 1 if share == 1 else round(size * share)

    def _sft(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        encoded = self._example(example)
        ids, mask = encoded.ids, encoded.mask
        stats.note(encoded.notes)
        stats.longest = max(stats.longest, len(ids))
        for piece, piece_mask in self._fit(number, ids, mask, stats):
            trained = sum(piece_mask[1:])
            if not trained:
                stats.drop(NOTHING if any(mask) else UNANSWERED, len(piece))
                continue
            stats.kept += 1
            stats.tokens += len(piece)
            stats.trained_tokens += trained
            tokens, keep = np.array(piece, np.int32), np.array(piece_mask, bool)
            keep[0] = False  # nothing comes before it; in a packed row it would be predicted from another document
            yield {"input_ids": tokens, "labels": np.where(keep, tokens, IGNORED).astype(np.int32)}

    def prompt(self, example: Example) -> Ids:
        """Tokens of a dialogue up to where its last answer starts, as training has them.

        Raises:
            ChatError: the chat template refuses the conversation, or there is none.
        """
        asked = prompt_of(example, "sft") or {}
        if "messages" not in asked:
            return self._opening(asked["prompt"])
        if example.get("templated") and self.chat.template is None:
            return self._opening("\n\n".join(message["content"] for message in asked["messages"]))
        return self.prompt_ids(asked["messages"], example.get("tools"))

    def _opening(self, text: str) -> Ids:
        return self.frame.opened(self._ids(text))

    def _plain(self, text: str) -> Ids:
        return self.frame.whole(self._ids(text))

    def _ids(self, text: str) -> Ids:
        ids: Ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def _example(self, example: Example) -> Encoded:
        """Tokens of one example, and which of them train."""
        if "text" in example:
            ids = self._plain(example["text"])
            return Encoded(ids, [], [1] * len(ids))
        tools = example.get("tools")
        if "messages" in example:
            return self.chat.conversation(example["messages"], tools)
        prompt, completion = self._plain_where_no_chat(example, "completion")
        if not isinstance(prompt, str):
            return self.chat.reply(prompt, completion, tools)
        ids = self._plain(prompt + completion)
        start = _common_prefix(self._opening(prompt), ids)
        return Encoded(ids, [], [0] * start + [1] * (len(ids) - start))

    def _plain_where_no_chat(self, example: Example, *names: str) -> list[Any]:
        """Prompt and answers; a template's texts as plain strings where the tokenizer has no chat template."""
        values = [example["prompt"], *(example[name] for name in names)]
        if not example.get("templated") or self.chat.template is not None:
            return values
        return ["\n\n".join(message["content"] for message in value) for value in values]

    def _fit(self, number: int, ids: Ids, mask: Ids, stats: Stats) -> list[tuple[Ids, Ids]]:
        """The example within the limit, as `overflow` says."""
        limit, overflow = self.encoding.limit, self.encoding.overflow
        if limit is None or len(ids) <= limit:
            return [(ids, mask)]
        if overflow == "split":
            return [(ids[at : at + limit], mask[at : at + limit]) for at in range(0, len(ids), limit)]
        if not self._may_cut(number, len(ids), stats):
            return []
        if any(mask[1:limit]):
            stats.truncated_examples += 1
            stats.truncated_tokens += len(ids) - limit
        else:
            stats.dropped_tokens += len(ids) - limit
        return [(ids[:limit], mask[:limit])]

    def _may_cut(self, number: int, length: int, stats: Stats) -> bool:
        if self.encoding.overflow == "error":
            stats.too_long.append((number, length))
        elif self.encoding.overflow == "drop":
            stats.drop(TOO_LONG, length)
        return self.encoding.overflow == "truncate"

    def whole(self, prompt: str | list[Message], answer: str | list[Message], tools: Tools = None) -> Ids:
        """Prompt and answer as a stage that trains on the pair sees them, end token included.

        Raises:
            ChatError: the chat template refuses them.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            return self._plain(prompt + answer)
        assert isinstance(answer, list)
        return self.chat.reply(prompt, answer, tools).ids

    def prompt_ids(self, prompt: str | list[Message], tools: Tools = None) -> Ids:
        """Tokens of a prompt, up to where its answer begins.

        Raises:
            ChatError: it is a conversation and the tokenizer has no chat template, or one that refuses it.
        """
        return self._opening(prompt) if isinstance(prompt, str) else self._ids(self.chat.prompt(prompt, tools))

    def _prompt(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        (prompt,) = self._plain_where_no_chat(example)
        tools = {"tools": example["tools"]} if example.get("tools") else {}
        ids = self.prompt_ids(prompt, **tools)
        stats.longest = max(stats.longest, len(ids))
        limit = self.encoding.limit
        if limit is not None and len(ids) > limit and not self._may_cut(number, len(ids), stats):
            return
        stats.kept += 1
        stats.tokens += len(ids)
        row = json.dumps({"prompt": prompt, "columns": example["columns"], **tools}, ensure_ascii=False)
        yield {"prompt_ids": np.array(ids, np.int32), "row": row}

    def _preference(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        if example["chosen"] == example["rejected"]:
            stats.drop(IDENTICAL, 0)
            return
        prompt, (chosen, chosen_mask), (rejected, rejected_mask) = self._pair(example, stats)
        whole = len(prompt) + max(len(chosen), len(rejected))
        stats.longest = max(stats.longest, whole)
        limit = self.encoding.limit
        total = len(prompt) + len(chosen) + len(rejected)
        if limit is not None and whole > limit and not self._may_cut(number, whole, stats):
            return
        room = None if limit is None else max(limit - len(prompt), 0)
        columns = {
            "prompt_ids": prompt[:limit],
            "chosen_ids": chosen[:room],
            "rejected_ids": rejected[:room],
            "chosen_mask": chosen_mask[:room],
            "rejected_mask": rejected_mask[:room],
        }
        yield from self._keep_pair(columns, total, stats)

    def _keep_pair(self, columns: dict[str, Ids], total: int, stats: Stats) -> Iterator[Columns]:
        kept = sum(len(columns[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        trained = sum(columns["chosen_mask"]), sum(columns["rejected_mask"])
        if not all(trained) or columns["chosen_ids"] == columns["rejected_ids"]:
            stats.drop(NOTHING, total)
            return
        stats.kept += 1
        stats.tokens += kept
        stats.trained_tokens += sum(trained)
        stats.truncated_examples += kept < total
        stats.truncated_tokens += total - kept
        yield {name: np.array(values, np.int32) for name, values in columns.items()}

    def _pair(self, example: Example, stats: Stats) -> tuple[Ids, tuple[Ids, Ids], tuple[Ids, Ids]]:
        """Tokens of the shared prompt, and of each answer with its mask."""
        prompt, *answers = self._plain_where_no_chat(example, "chosen", "rejected")
        if isinstance(prompt, str):
            opening = self._opening(prompt)
            wholes = [self._plain(prompt + answer) for answer in answers]
            sides = [Encoded(ids, [], [1] * len(ids), prompt=_common_prefix(opening, ids)) for ids in wholes]
        else:
            sides = [self.chat.reply(prompt, answer, example.get("tools")) for answer in answers]
            stats.note({note for side in sides for note in side.notes})
        start = min(side.prompt for side in sides)
        shared = _common_prefix(sides[0].ids[:start], sides[1].ids)
        first, second = ((side.ids[shared:], side.mask[shared:]) for side in sides)
        return sides[0].ids[:shared], first, second


def cut_blocks(tokens: list[Tokens], size: int) -> tuple[Tokens, Tokens]:
    """Tokens joined and cut into blocks [n, size], and the rest."""
    joined = np.concatenate(tokens)
    full = len(joined) // size * size
    return joined[:full].reshape(-1, size), joined[full:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about `TEXT_BATCH` characters."""
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
    """Tokens that two sequences have in common from their start."""
    return len(commonprefix([first, second]))  # noqa: RUF071 (of sequences, not of paths)
