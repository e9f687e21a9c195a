"""The trainer resolves `pvc://` URIs to the path where the operator mounts the claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.claims import claim_of, mounted
from finetune_trainer.data.sources import resolve
from finetune_trainer.storage.filesystem import Storage


@pytest.mark.parametrize(
    ("uri", "path", "claim"),
    [
        ("pvc://models/llama/8b", "/pvc/models/llama/8b", "models"),
        ("pvc://models", "/pvc/models", "models"),
        ("s3://bucket/pvc://x", "s3://bucket/pvc://x", None),
        ("/pvc/models", "/pvc/models", None),
    ],
)
def test_where_a_uri_leads(uri: str, path: str, claim: str | None) -> None:
    assert (mounted(uri), claim_of(uri)) == (path, claim)


def test_model_and_data_of_a_claim_are_local(tmp_path: Path) -> None:
    storage = Storage("pvc://models/llama")
    assert storage.is_local and storage.download("", tmp_path) == Path("/pvc/models/llama")
    assert resolve("pvc://corpus/*.jsonl", tmp_path) == "/pvc/corpus/*.jsonl"
