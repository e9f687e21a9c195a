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

from finetune_trainer.data.chat import ChatError, ChatFormat, Encoded
from finetune_trainer.data.forms import Example, Kind, Message
from finetune_trainer.data.questions import prompt_of
from finetune_trainer.data.report import Stats

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
    """A tokenizer at work for one stage.

    Plain text begins with the tokenizer's begin-of-text token, where the tokenizer puts one itself, and ends with its
    end-of-text token (separator, where there is none).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> None:
        self.encoding = encoding
        self.chat = ChatFormat(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        bos, first = tokenizer.bos_token_id, self.backend.encode("").ids[:1]
        self.lead: Ids = first if bos is not None and first == [bos] else []
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        self.end: Ids = [] if eos is None else [eos]

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
        return [np.array(self.lead + encoding.ids + self.end, np.int32) for encoding in encodings]

    def _count_block(self, stats: Stats, size: int) -> None:
        share = self.encoding.trained_share
        stats.tokens += size
        stats.trained_tokens += size - 1 if share == 1 else round(size * share)

    def _sft(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        ids, mask = self._example(example)
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
        self._need_template()
        ids: Ids = self.backend.encode(self.chat.prompt(asked["messages"]), add_special_tokens=False).ids
        return ids

    def _opening(self, text: str) -> Ids:
        ids = self._plain(text)
        return ids[: len(ids) - len(self.end)]

    def _example(self, example: Example) -> tuple[Ids, Ids]:
        """Tokens of one example and the mask of those that train."""
        if "text" in example:
            ids = self._plain(example["text"])
            return ids, [1] * len(ids)
        if "messages" in example:
            encoded = self._conversation(example["messages"])
            return encoded.ids, encoded.mask
        prompt, completion = self._plain_where_no_chat(example, "completion")
        if isinstance(prompt, str):
            ids = self._plain(prompt + completion)
            start = _common_prefix(self.lead + self.backend.encode(prompt, add_special_tokens=False).ids, ids)
            return ids, [0] * start + [1] * (len(ids) - start)
        encoded, _ = self._reply(prompt, completion)
        return encoded.ids, encoded.mask

    def _plain(self, text: str) -> Ids:
        ids: Ids = self.backend.encode(text, add_special_tokens=False).ids
        return self.lead + ids + self.end

    def _plain_where_no_chat(self, example: Example, *names: str) -> list[Any]:
        """Prompt and answers; a template's texts as plain strings where the tokenizer has no chat template."""
        values = [example["prompt"], *(example[name] for name in names)]
        if not example.get("templated") or self.chat.template is not None:
            return values
        return ["\n\n".join(message["content"] for message in value) for value in values]

    def _conversation(self, messages: list[Message]) -> Encoded:
        self._need_template()
        return self.chat.encode(*self.chat.render(messages))

    def _reply(self, prompt: list[Message], answer: list[Message]) -> tuple[Encoded, int]:
        """Prompt and answer encoded as one, and the number of the prompt's tokens."""
        self._need_template()
        text, spans, start = self.chat.reply(prompt, answer)
        encoded = self.chat.encode(text, spans)
        return encoded, int(np.searchsorted(encoded.starts, start))

    def _need_template(self) -> None:
        if self.chat.template is None:
            raise ChatError("the row is a conversation, but the tokenizer has no chat template")

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

    def whole(self, prompt: str | list[Message], answer: str | list[Message]) -> Ids:
        """Prompt and answer as a stage that trains on the pair sees them, end token included.

        Raises:
            ChatError: the chat template refuses them.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            return self._plain(prompt + answer)
        assert isinstance(answer, list)
        return self._reply(prompt, answer)[0].ids

    def prompt_ids(self, prompt: str | list[Message]) -> Ids:
        """Tokens of a prompt, up to where its answer begins.

        Raises:
            ChatError: it is a conversation and the tokenizer has no chat template, or one that refuses it.
        """
        if isinstance(prompt, str):
            return self._opening(prompt)
        self._need_template()
        return self.chat.encode(self.chat.prompt(prompt), []).ids

    def _prompt(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        (prompt,) = self._plain_where_no_chat(example)
        ids = self.prompt_ids(prompt)
        stats.longest = max(stats.longest, len(ids))
        limit = self.encoding.limit
        if limit is not None and len(ids) > limit and not self._may_cut(number, len(ids), stats):
            return
        stats.kept += 1
        stats.tokens += len(ids)
        row = json.dumps({"prompt": prompt, "columns": example["columns"]}, ensure_ascii=False)
        yield {"prompt_ids": np.array(ids, np.int32), "row": row}

    def _preference(self, number: int, example: Example, stats: Stats) -> Iterator[Columns]:
        if example["chosen"] == example["rejected"]:
            stats.drop(IDENTICAL, 0)
            return
        prompt, (chosen, chosen_mask), (rejected, rejected_mask) = self._pair(example)
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

    def _pair(self, example: Example) -> tuple[Ids, tuple[Ids, Ids], tuple[Ids, Ids]]:
        """Tokens of the shared prompt, and of each answer with its mask."""
        prompt, *answers = self._plain_where_no_chat(example, "chosen", "rejected")
        if isinstance(prompt, str):
            alone = self._plain(prompt)
            sides = [(ids, [1] * len(ids)) for ids in (self._plain(prompt + answer) for answer in answers)]
            start = min(_common_prefix(alone[: len(alone) - len(self.end)], ids) for ids, _ in sides)
        else:
            encoded = [self._reply(prompt, answer) for answer in answers]
            start = min(count for _, count in encoded)
            sides = [(one.ids, one.mask) for one, _ in encoded]
        shared = _common_prefix(sides[0][0][:start], sides[1][0])
        first, second = ((ids[shared:], mask[shared:]) for ids, mask in sides)
        return sides[0][0][:shared], first, second


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
