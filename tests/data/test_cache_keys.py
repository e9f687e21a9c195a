"""The cache key includes every field that affects the data, including fields that are added later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.data import DataSource, DataSpec, Join
from finetune_trainer.data.cache_keys import FILES_FOUND_BY, HUB_FIELDS, ROWS_CHOSEN_BY, rows_key
from finetune_trainer.data.encode import Encoding
from finetune_trainer.data.hashes import stream_hash
from finetune_trainer.data.sources import Located

INLINE = [{"text": "a"}]
Key = Callable[[DataSpec, DataSource], str]


class LaterSpec(DataSpec):
    """A data spec with a field that a later version adds."""

    strip: bool = False


class LaterSource(DataSource):
    """A source with a field that a later version adds."""

    skip_rows: int = 0


def _table(spec: DataSpec, source: DataSource) -> str:
    return rows_key([Located(source, [], None)], spec, "text")


def _stream(spec: DataSpec, source: DataSource, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("finetune_trainer.data.hashes.tokenizer_parts", lambda tokenizer: ("", ""))
    return stream_hash(spec, [Located(source, [], None)], Encoding("text", 8), False, None)


@pytest.fixture(params=["table", "stream"])
def key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Key:
    if request.param == "table":
        return _table
    return lambda spec, source: _stream(spec, source, monkeypatch)


def _spec(source: DataSource, **fields: Any) -> LaterSpec:
    return LaterSpec(sources=[source], **fields)


def test_a_field_that_is_added_later_changes_the_key(key: Key) -> None:
    source, skipping = LaterSource(inline=INLINE), LaterSource.model_validate({"inline": INLINE, "skipRows": 3})
    plain = key(_spec(source), source)
    assert plain == key(_spec(source), LaterSource(inline=INLINE))
    assert plain != key(_spec(source, strip=True), source)
    assert plain != key(_spec(skipping), skipping)


def test_where_rows_come_from_and_their_order_do_not_change_the_key_of_a_table() -> None:
    source = DataSource(inline=INLINE)
    moved = [source.model_copy(update={"file": "other.jsonl", "format": "jsonl"})]
    chosen = DataSpec(sources=[source], limit=1, shuffle=False, seed=1)
    assert _table(DataSpec(sources=[source]), source) == _table(chosen, moved[0])


def test_a_joined_table_is_known_by_its_contents() -> None:
    sources = [DataSource(inline=INLINE, join=Join(file=name, key="id")) for name in ("a.csv", "b.csv")]
    keys = {
        rows_key([Located(source, [], table)], DataSpec(sources=[source]), "text")
        for source in sources
        for table in ({"1": {"id": "1"}}, {"1": {"id": "1", "more": "x"}})
    }
    assert len(keys) == 2


def test_what_is_excluded_are_fields() -> None:
    """If an excluded field is renamed, it becomes part of the key again."""
    assert set(DataSpec.model_fields) >= ROWS_CHOSEN_BY
    assert set(DataSource.model_fields) >= FILES_FOUND_BY | HUB_FIELDS
