"""Checkpoints on a real S3 server are complete or absent, and clients wait during an outage of the server."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from support.storage.s3_server import BUCKET, S3Server

from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.sources import find_files
from finetune_trainer.errors import Interrupted
from finetune_trainer.layout import MANIFEST, RUN_CONFIG, StageLayout
from finetune_trainer.storage import retry
from finetune_trainer.storage.checkpoints import CheckpointStore
from finetune_trainer.storage.fencing import AttemptFence
from finetune_trainer.storage.filesystem import Storage

MIB = 1 << 20
RUN = {"world_size": 1, "zero": 0, "rows_per_step": 2, "shards": 1}


@pytest.fixture
def storage(s3: S3Server) -> Storage:
    return Storage(f"s3://{BUCKET}/{uuid4().hex}")


@pytest.fixture
def store(storage: Storage, tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(storage, StageLayout(0, "sft"), tmp_path / "scratch")


def written(store: CheckpointStore, step: int, size: int = 1000) -> Path:
    """Write the files of a checkpoint to the local disk, as a worker does."""
    place = store.local_directory(step)
    (place / "inner").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(random.Random(step).randbytes(size))
    (place / "inner" / "rng").write_text(str(step))
    return place


def test_files_as_on_a_disk(storage: Storage) -> None:
    assert not storage.exists("a/b.txt") and storage.names("a") == []
    storage.write_text("a/b.txt", "one")
    storage.write_text("a/b.txt", "two, which replaces it")
    assert storage.exists("a/b.txt") and storage.read_text("a/b.txt").startswith("two")
    assert storage.names("a") == ["b.txt"] and storage.sizes("a") == {"b.txt": 22}
    storage.delete("a")
    storage.delete("a")
    assert storage.sizes("") == {} and storage.sizes("a") == {} and storage.names("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read_text("a/b.txt")


def test_a_directory_is_downloaded_once_and_read_in_ranges(storage: Storage, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin", "left-out"):
        (made / name).write_bytes(random.Random(name).randbytes(3000))
    storage.upload(made, "model", ["a.bin", "inner/b.bin"])
    assert storage.sizes("model") == {"a.bin": 3000, "inner/b.bin": 3000}
    assert storage.read_range("model/a.bin", 1000, 9000) == (made / "a.bin").read_bytes()[1000:]
    place = storage.download("model", tmp_path / "here")
    before = {path: path.stat().st_mtime_ns for path in (place / "a.bin", place / "inner/b.bin")}
    (place / "inner/b.bin").write_bytes(b"cut")
    storage.download("model", tmp_path / "here")
    assert (place / "a.bin").stat().st_mtime_ns == before[place / "a.bin"], "an unchanged file was fetched again"
    assert (place / "inner/b.bin").read_bytes() == (made / "inner/b.bin").read_bytes(), "a damaged file was kept"


def test_large_files_go_in_parts_and_come_back_the_same(store: CheckpointStore, tmp_path: Path, s3: S3Server) -> None:
    place = written(store, 7, 120 * MIB)
    content = (place / "model.safetensors").read_bytes()
    store.push(7)
    store.publish(7, **RUN)
    path = store.storage.path(store.layout.checkpoint(7) + "/model.safetensors")
    assert "-" in s3.fs.info(path)["ETag"], "not a multipart upload"
    store.drop_copy(7)
    assert not place.exists()
    store.fetch(7)
    assert (place / "model.safetensors").read_bytes() == content
    assert (place / "inner" / "rng").read_text() == "7"


def test_a_checkpoint_counts_once_its_manifest_is_there(store: CheckpointStore) -> None:
    written(store, 1)
    store.push(1)
    assert store.steps() == [1] and store.newest() is None
    store.publish(1, **RUN)
    for step in (2, 3):
        written(store, step)
        store.push(step)
    newest = store.newest()
    assert newest is not None and newest.step == 1 and newest.files["inner/rng"] == 1
    assert store.clean() == [2, 3] and store.steps() == [1]


def test_parts_of_an_upload_that_never_ended_go_too(store: CheckpointStore, s3: S3Server) -> None:
    """Only uploads of this stage are removed, because another stage's upload may be in progress."""
    bucket, _, root = store.storage.path("").partition("/")
    own, others = f"{root}/{store.layout.checkpoint(9)}/model.safetensors", f"{root}-other/model.safetensors"
    for key in (own, others):
        upload = s3.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)["UploadId"]
        s3.fs.call_s3("upload_part", Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 5 * MIB)
    store.clean()
    left = s3.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads") or []
    assert [item["Key"] for item in left if item["Key"].startswith(root)] == [others]


def test_a_checkpoint_that_lost_a_file_does_not_count(store: CheckpointStore, tmp_path: Path) -> None:
    written(store, 1)
    store.push(1)
    store.publish(1, **RUN)
    store.storage.delete(f"{store.layout.checkpoint(1)}/model.safetensors")
    assert CheckpointStore(store.storage, store.layout, tmp_path).newest() is None


def test_the_last_checkpoints_are_kept(store: CheckpointStore) -> None:
    for step in (5, 10, 15, 20):
        written(store, step)
        store.push(step)
        store.publish(step, **RUN)
        store.prune(2)
    assert store.steps() == [15, 20]
    assert json.loads(store.storage.read_text(f"{store.layout.checkpoint(20)}/{MANIFEST}"))["step"] == 20


def test_a_download_has_just_what_storage_has(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_text("of another run")
    storage.write_text("result/config.json", "{}")
    assert storage.download("result", tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_server_that_is_away_in_the_middle_of_a_save_loses_no_checkpoint(
    store: CheckpointStore, s3: S3Server, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed during or after the start of an upload and restarts later; the wait is reported."""
    told: list[str] = []
    monkeypatch.setattr(retry._waits, "report", None)  # monkeypatch restores the previous listener
    retry.on_waiting(told.append)
    place = written(store, 30, 200 * MIB)
    content = (place / "model.safetensors").read_bytes()
    saving = threading.Thread(target=lambda: (store.push(30), store.publish(30, **RUN)))
    saving.start()
    time.sleep(seconds)
    assert saving.is_alive(), "the save was over before the server was stopped"
    s3.stop()
    saving.join(5)
    assert saving.is_alive(), "nothing waits for the server"
    s3.start()
    saving.join(90)
    assert not saving.is_alive() and store.newest() is not None
    assert ": uploading stages/00-sft/checkpoints/checkpoint-30/" in told[0] and told[-1] == "", told
    store.drop_copy(30)
    store.fetch(30)
    assert (place / "model.safetensors").read_bytes() == content


def test_what_no_waiting_mends_is_told_at_once(s3: S3Server) -> None:
    started = time.monotonic()
    with pytest.raises(PermissionError):
        Storage(f"s3://{BUCKET}/x", key="nobody", secret="wrong").write_text("a", "b")
    with pytest.raises(FileNotFoundError):
        Storage("s3://no-such-bucket-here/x").read_text("a")
    assert time.monotonic() - started < 20


def test_patience_ends(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.1)
    nowhere = Storage(f"s3://{BUCKET}/x", retry_seconds=0.2, endpoint_url="http://127.0.0.1:9")
    with pytest.raises(OSError, match="writing a"):
        nowhere.write_text("a", "b")


def test_rows_of_a_bucket_as_a_source(storage: Storage, tmp_path: Path) -> None:
    for name in ("b", "a"):
        storage.write_text(f"data/{name}.jsonl", json.dumps({"text": name}) + "\n")
    for uri in ("data/", "data/*.jsonl"):
        files = find_files(f"s3://{storage.root}/{uri}", "uri", "auto", "data", tmp_path)
        assert [row["text"] for file in files for row, _ in read_rows(file)] == ["a", "b"]


def test_an_attempt_that_a_later_one_has_followed_saves_no_more(storage: Storage) -> None:
    """The old attempt may still run, for example on a node that the cluster has given up."""
    first, second = AttemptFence(storage, 1), AttemptFence(storage, 2)
    first.check()  # no later attempt has begun, so the check passes
    storage.write_text(RUN_CONFIG, json.dumps({"attempt": 1}))
    first.check()
    storage.write_text(RUN_CONFIG, json.dumps({"attempt": 2}))
    second.check()
    with pytest.raises(Interrupted, match="attempt 2 has taken over from attempt 1"):
        first.check()
