"""Storage and checkpoints at `gs://`, on a server with Google Cloud Storage's API (fake-gcs-server)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from support.cluster.kube_assets import MissingAsset, assets
from support.cluster.servers import Server, free_port

from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.sources import find_files
from finetune_trainer.layout import MANIFEST, StageLayout
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.filesystem import Storage

pytestmark = [pytest.mark.long, pytest.mark.timeout(120, func_only=True)]  # the first test builds the server
BUCKET = "models"
MIB = 1 << 20


class GcsServer:
    """A context manager that starts the server with a bucket and stops it."""

    def __init__(self, program: Path, directory: Path) -> None:
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        options = ["-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=filesystem"]
        places = [f"-filesystem-root={directory / 'data'}", f"-public-host=127.0.0.1:{port}"]
        (directory / "data" / BUCKET).mkdir(parents=True)
        self._server = Server("fake-gcs-server", [str(program), *options, *places], directory / "log")

    def __enter__(self) -> GcsServer:
        self._server.start(self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/storage/v1/b/{BUCKET}", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    try:
        program = assets(["fake-gcs-server"])["fake-gcs-server"]
    except MissingAsset as missing:
        pytest.skip(str(missing))
    with GcsServer(program, tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture
def storage(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Return the storage that the environment configures, as in a job."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
    return Storage(f"gs://{BUCKET}/{uuid4().hex}", token="anon", endpoint_url=gcs.endpoint)


def test_files_as_on_a_disk(storage: Storage) -> None:
    assert not storage.exists("a/b.txt") and storage.names("a") == []
    storage.write_text("a/b.txt", "one")
    storage.write_text("a/b.txt", "two, which replaces it")
    assert storage.read_text("a/b.txt").startswith("two")
    assert storage.names("a") == ["b.txt"] and storage.sizes("a") == {"b.txt": 22}
    storage.delete("a")
    storage.delete("a")
    assert storage.sizes("") == {} and storage.names("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read_text("a/b.txt")


def test_a_checkpoint_counts_once_its_manifest_is_there(storage: Storage, tmp_path: Path) -> None:
    store = CheckpointStore(storage, StageLayout(0, "sft"), tmp_path / "scratch")
    run = {"world_size": 1, "zero": 0, "rows_per_step": 2, "shards": 1}
    for step in (1, 2, 3):
        (store.local_directory(step) / "inner").mkdir(parents=True)
        (store.local_directory(step) / "model.safetensors").write_bytes(bytes([step]) * 20 * MIB)
        (store.local_directory(step) / "inner" / "rng").write_text(str(step))
        store.push(step)
        if step < 3:
            store.publish(step, **run)
            store.prune(1)
    newest = store.newest()
    assert newest is not None and newest.step == 2 and store.steps() == [2, 3]
    assert store.clean() == [3] and store.steps() == [2]
    store.drop_copy(2)
    store.fetch(2)
    assert (store.local_directory(2) / "model.safetensors").read_bytes() == bytes([2]) * 20 * MIB
    assert json.loads(storage.read_text(f"{store.layout.checkpoint(2)}/{MANIFEST}"))["files"]["inner/rng"] == 1


def test_rows_of_a_bucket_as_a_source(storage: Storage, tmp_path: Path) -> None:
    for name in ("b", "a"):
        storage.write_text(f"data/{name}.jsonl", json.dumps({"text": name}) + "\n")
    for uri in ("data/", "data/*.jsonl"):
        files = find_files(f"gs://{storage.root}/{uri}", "uri", "auto", "data", tmp_path)
        assert [row["text"] for file in files for row, _ in read_rows(file)] == ["a", "b"]
