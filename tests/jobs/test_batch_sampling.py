"""The rows of each step are independent of the number of workers, complete, without duplicates, and reproducible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune_api.data import DataSpec
from finetune_trainer.data import StreamedRows
from finetune_trainer.data.encode import Encoding
from finetune_trainer.training.batches import Division, Feed, StepSampler, StreamSteps

ROWS = 8, 12, 24
WORKERS = 1, 2, 3, 4, 5, 8


@pytest.mark.parametrize("rows", [1, 5, 7, *ROWS])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_a_step_is_divided_without_rest(rows: int, workers: int, most: int) -> None:
    divisions = [Division(24, most, workers, rank) for rank in range(workers)]
    shares = [[part.tolist() for part in division.share(rows)] for division in divisions]
    assert {len(share) for share in shares} == {divisions[0].passes(rows)}, "all workers make as many passes"
    assert all(1 <= len(part) <= most for share in shares for part in share)
    given = [position for share in shares for part in share for position in part]
    assert set(given) == set(range(rows))
    if rows >= workers * divisions[0].passes(rows):
        assert len(given) == rows, "no row is given to two workers"
    for position in range(rows):
        owner = divisions[0].owner(position, rows)
        assert any(position in part for part in shares[owner])


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_order_is_that_of_accelerate(workers: int) -> None:
    length, most, accumulation, seed = 64, 2, 2, 3
    for rank in range(workers):
        ours = StepSampler(length, Division(most * accumulation * workers, most, workers, rank), seed)
        random = SeedableRandomSampler(range(length), generator=torch.Generator(), data_seed=seed)
        theirs = BatchSamplerShard(BatchSampler(random, most, False), workers, rank)
        for epoch in range(2):
            ours.set_epoch(epoch)
            random.set_epoch(epoch)
            assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("length", [48, 50, 61])
def test_steps_have_the_same_rows_with_any_workers(length: int) -> None:
    def steps(workers: int) -> list[set[int]]:
        samplers = [StepSampler(length, Division(12, 2, workers, rank), 0) for rank in range(workers)]
        found: list[set[int]] = []
        for batches in zip(*samplers, strict=True):
            rows = {row for batch in batches for row in batch}
            if not found or len(found[-1]) == 12:
                found.append(set())
            assert not found[-1] & rows
            found[-1] |= rows
        assert {len(sampler) for sampler in samplers} == {sum(1 for _ in samplers[0])}
        return found

    alone = steps(1)
    assert sorted(row for step in alone for row in step) == list(range(length))
    assert alone == steps(2) == steps(3)


class _Seen(Dataset[dict[str, Any]]):
    """A dataset that records which rows are read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, list[int]()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"index": index}


def test_skipping_reads_and_collates_nothing() -> None:
    """Transformers skips batches this way when it resumes a run."""
    collated: list[list[int]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        collated.append([row["index"] for row in rows])
        return {"index": torch.tensor(collated[-1])}

    whole = [batch["index"].tolist() for batch in _feed().loader(_Seen(1_000_000), collate)]
    rows, passed = _Seen(1_000_000), 200_000
    collated.clear()
    loader = skip_first_batches(_feed().loader(rows, collate), passed)
    rest = [batch["index"].tolist() for batch in islice(loader, 3)]
    assert rest == whole[passed : passed + 3] == collated
    assert rows.read == [index for batch in rest for index in batch]


def _feed() -> Feed:
    return Feed(Division(8, 4, 1, 0), 1, seed=5)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(params=["sft", "packed", "text"])
def stream(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> StreamedRows:
    """Return an endless stream of distinct documents: one per row, packed, or cut into blocks."""
    documents = [{"text": f"{number} says {number * number} " * (1 + number % 5)} for number in range(97)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, documents)))
    spec = DataSpec.model_validate({"sources": [{"file": "rows.jsonl"}], "streaming": True})
    kind = "text" if request.param == "text" else "sft"
    encoding = Encoding(kind, 32 if kind == "text" else 64, "split")
    return StreamedRows(spec, tokenizer, encoding, request.param == "packed", "data", tmp_path)


STEPS, STREAM_ROWS, MOST, SHARDS = 6, 12, 3, 2


def _read(stream: StreamedRows, workers: int, feeds: list[Feed], steps: int) -> list[list[str]]:
    """Return the sorted rows of each step; `feeds` has one feed per worker, which continue from call to call."""
    loaders: list[Iterator[list[dict[str, Any]]]] = [iter(feed.loader(stream, lambda rows: rows)) for feed in feeds]
    made = []
    for _ in range(steps):
        passes = [feeds[0].division.accumulation] * workers
        rows = [
            row
            for loader, count in zip(loaders, passes, strict=True)
            for batch in islice(loader, count)
            for row in batch
        ]
        made.append(sorted(json.dumps(row, sort_keys=True) for row in rows))
    return made


def _feeds(workers: int, step: int = 0, checkpoint: Path | None = None) -> list[Feed]:
    return [Feed(Division(STREAM_ROWS, MOST, workers, rank), SHARDS, 0, step, checkpoint) for rank in range(workers)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_stream_goes_on_at_the_next_row_with_any_workers(stream: StreamedRows, workers: int, tmp_path: Path) -> None:
    undisturbed = _read(stream, SHARDS, _feeds(SHARDS), 2 * STEPS)
    begun = _feeds(SHARDS)
    assert _read(stream, SHARDS, begun, STEPS) == undisturbed[:STEPS]
    for feed in begun:
        feed.save(STEPS, tmp_path)
    goes_on = _feeds(workers, STEPS, tmp_path)
    assert _read(stream, workers, goes_on, 2) == undisturbed[STEPS : STEPS + 2]

    (tmp_path / "later").mkdir()
    for feed in goes_on:
        feed.save(STEPS + 2, tmp_path / "later")
    assert {path.name for path in (tmp_path / "later").iterdir()} == {"stream-0.json", "stream-1.json"}
    last = _feeds(SHARDS, STEPS + 2, tmp_path / "later")
    assert _read(stream, SHARDS, last, STEPS - 2) == undisturbed[STEPS + 2 :]


def test_a_resumed_stream_replays_no_batch(
    stream: StreamedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = _feeds(1)
    _read(stream, 1, begun, STEPS)
    begun[0].save(STEPS, tmp_path)
    taken: list[int] = []
    real = StreamSteps._take
    monkeypatch.setattr(
        StreamSteps, "_take", lambda self, position, *rest: (taken.append(position), real(self, position, *rest))[1]
    )
    _read(stream, 1, _feeds(1, STEPS, tmp_path), 1)
    assert taken == list(range(STREAM_ROWS))


def test_beginning_to_read_a_stream_leaves_the_global_random_numbers_alone(stream: StreamedRows) -> None:
    state = torch.random.get_rng_state()
    next(iter(_feed_of_one(stream)))
    assert torch.equal(torch.random.get_rng_state(), state)


def _feed_of_one(stream: StreamedRows) -> DataLoader[Any]:
    return _feeds(1)[0].loader(stream, lambda rows: rows)


def test_a_stream_of_other_rows_begins_anew_and_counts_on(stream: StreamedRows, tmp_path: Path) -> None:
    """The stream's position in a checkpoint means nothing for other rows."""
    undisturbed = _read(stream, SHARDS, _feeds(SHARDS), STEPS)
    anew = _feeds(SHARDS, STEPS)
    assert _read(stream, SHARDS, anew, 2) == undisturbed[:2]
    for feed in anew:
        feed.save(STEPS + 2, tmp_path)
    assert _read(stream, SHARDS, _feeds(SHARDS, STEPS + 2, tmp_path), 2) == undisturbed[2:4]
