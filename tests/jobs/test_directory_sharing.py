"""Directories are copied between nodes in chunks, verified and resumed; workers wait for each other afterwards."""

from __future__ import annotations

import copy
import multiprocessing
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.api.sample_job import JOB
from support.cluster.servers import free_port
from support.jobs.two_workers import on_two_workers
from transformers import AutoTokenizer

from finetune_api.cluster import RunPolicy
from finetune_api.runconfig import RunConfig
from finetune_trainer.data import Prepared, prepare
from finetune_trainer.data.cache_usage import note_prepared
from finetune_trainer.launch import worker_group
from finetune_trainer.launch.failures import Kind, _kind
from finetune_trainer.launch.sharing.carriers import (
    IN_FLIGHT_BYTES,
    STREAMS,
    StorageCarrier,
    chunk_bytes,
    nodes_share_storage,
)
from finetune_trainer.launch.sharing.files import Entry, Roots, list_entries, read_chunk
from finetune_trainer.launch.sharing.node_files import NodeFiles
from finetune_trainer.launch.sharing.offer import Offers
from finetune_trainer.launch.sharing.receiver import Receiver
from finetune_trainer.launch.sharing.records import SharedDirectory
from finetune_trainer.plan.workers import Workers
from finetune_trainer.stage_graph import directories
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.collectives import Collectives, missing_ranks
from finetune_trainer.training.context import Placement
from finetune_trainer.training.deepspeed import set_group_timeout

DATA = SharedDirectory("cache", "prepared/abc")
CHUNK = 1000


class Wire:
    """A reader that counts bytes, and fails after a number of bytes or damages the first chunks."""

    def __init__(self, roots: Roots, breaks_after: int | None = None, damages: int = 0) -> None:
        self.roots, self.left, self.damages = roots, breaks_after, damages
        self.bytes, self.largest = 0, 0

    def read(self, place: SharedDirectory, path: str, offset: int, size: int) -> bytes:
        if self.left is not None and self.bytes >= self.left:
            raise ConnectionError("the other node is away")
        content = read_chunk(self.roots.path_of(place), path, offset, size)
        self.bytes, self.largest = self.bytes + len(content), max(self.largest, size)
        if self.damages:
            self.damages -= 1
            return bytes(len(content))
        return content


def nodes(tmp_path: Path) -> tuple[Roots, Roots]:
    """Return two nodes, the first of which has 10,500 bytes of data."""
    first, second = (Roots(str(tmp_path / name / "cache"), str(tmp_path / name / "hub")) for name in "ab")
    directory = first.path_of(DATA)
    (directory / "train").mkdir(parents=True)
    (directory / "train/0.arrow").write_bytes(os.urandom(10_000))
    (directory / "report.json").write_bytes(os.urandom(500))
    return first, second


def received(first: Roots, second: Roots, wire: Wire) -> int:
    receiver = Receiver(second, wire.read, CHUNK, streams=1)
    return receiver.receive(DATA, lambda: list_entries(first.path_of(DATA)))


def same(one: Path, other: Path) -> bool:
    files = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
             for root in (one, other)]  # fmt: skip
    return files[0] == files[1]


def test_a_directory_travels_once_in_chunks(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    wire = Wire(first)
    assert received(first, second, wire) == wire.bytes == 10_500
    assert wire.largest == CHUNK and same(first.path_of(DATA), second.path_of(DATA))
    assert received(first, second, wire) == 0 and wire.bytes == 10_500


def test_what_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    broken = Wire(first, breaks_after=4_000)
    with pytest.raises(ConnectionError, match="away"):
        received(first, second, broken)
    assert not second.path_of(DATA).exists(), "half of a directory counts as the whole"
    again = Wire(first)
    assert received(first, second, again) == again.bytes == 10_500 - broken.bytes
    assert same(first.path_of(DATA), second.path_of(DATA))


def test_damaged_bytes_are_fetched_again_and_never_used(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    assert received(first, second, Wire(first, damages=1)) > 10_500
    assert same(first.path_of(DATA), second.path_of(DATA))
    third = Roots(str(tmp_path / "c"), "")
    with pytest.raises(OSError, match="damaged twice"):
        received(first, third, Wire(first, damages=1000))
    assert not third.path_of(DATA).exists()


def test_a_hub_repository_gets_what_it_lacks_with_its_links(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    model = SharedDirectory("hub", "models--a--b")
    for roots, files in ((first, ("x", "y")), (second, ("x",))):
        (roots.path_of(model) / "blobs").mkdir(parents=True)
        (roots.path_of(model) / "snapshots/1").mkdir(parents=True)
        for name in files:
            (roots.path_of(model) / "blobs" / name).write_bytes(b"weights" * 100)
            (roots.path_of(model) / "snapshots/1" / f"{name}.safetensors").symlink_to(f"../../blobs/{name}")
    wire = Wire(first)
    count = Receiver(second, wire.read, CHUNK, 2).receive(model, lambda: list_entries(first.path_of(model)))
    assert count == wire.bytes == 700
    link = second.path_of(model) / "snapshots/1/y.safetensors"
    assert link.is_symlink() and link.read_bytes() == b"weights" * 100


def run_of(**storage: str) -> RunConfig:
    job = copy.deepcopy(JOB)
    job["spec"]["storage"] = storage
    return RunConfig.model_validate({"job": job, "root": "/x", "baseDir": "/", "cacheDir": "/cache"})


def test_storage_carries_what_every_node_can_see(tmp_path: Path) -> None:
    first, second = nodes(tmp_path)
    storage = Storage("memory://sharing/job")
    StorageCarrier(storage).put(DATA, first.path_of(DATA))
    carrier = StorageCarrier(storage)
    assert Receiver(second, carrier.read, CHUNK, 2).receive(DATA, lambda: carrier.entries(DATA)) == 10_500
    assert same(first.path_of(DATA), second.path_of(DATA))
    local = Storage(str(tmp_path))  # in a pod, where a claim is mounted
    assert nodes_share_storage(run_of(path="/x"), storage) and nodes_share_storage(run_of(uri="pvc://claim/x"), local)
    assert not nodes_share_storage(run_of(path="/x"), local)


def test_the_driver_offers_by_storage_and_cleans_up_unless_nodes_share_a_cache(tmp_path: Path) -> None:
    job = copy.deepcopy(JOB)
    job["spec"]["storage"] = {"uri": "memory://offers"}
    note_prepared("0123")
    for claim in (None, "cache"):
        job["spec"]["kubernetes"] = {"modelCacheClaim": claim} if claim else {}
        places = {"root": "memory://offers/job", "baseDir": "/", "cacheDir": str(tmp_path)}
        run, storage = RunConfig.model_validate({"job": job, **places}), Storage("memory://offers/job")
        data = tmp_path / "prepared/0123"
        data.mkdir(parents=True, exist_ok=True)
        (data / "report.json").write_text("{}")
        offers = Offers(run, storage, print)
        offer = offers.make()
        offered = [place for place in offer.directories if place.path == "prepared/0123"]
        assert bool(offered) is (claim is None) and storage.exists("shared") is (claim is None)
        assert claim or (tmp_path / offer.marker).exists()
        offers.close(done=False)
        assert storage.exists("shared") is (claim is None), "a later attempt has it from there"
        offers.close(done=True)
        assert not storage.exists("shared") and not list(tmp_path.glob(".driver-*"))


def test_paths_do_not_leave_the_directory(tmp_path: Path) -> None:
    for path in ("../x", "/etc/passwd"):
        with pytest.raises(ValueError):
            read_chunk(tmp_path, path, 0, 1)


@pytest.mark.parametrize("count", [1, 2, 8, 64, 500])
def test_chunks_of_all_nodes_fit_rays_store(count: int) -> None:
    assert count * STREAMS * chunk_bytes(count) <= IN_FLIGHT_BYTES


def test_a_download_is_not_repeated_unless_the_store_has_another_file(tmp_path: Path) -> None:
    storage = Storage("memory://sharing/model")
    storage.write_bytes("m/a.bin", b"1" * 50)
    storage.write_bytes("m/b.bin", b"2" * 50)
    place = storage.download("m", tmp_path / "m")
    before = (place / "b.bin").stat().st_mtime_ns
    storage.write_bytes("m/a.bin", b"3" * 50)
    Storage("memory://sharing/model").download("m", tmp_path / "m")
    assert (place / "a.bin").read_bytes() == b"3" * 50
    assert (place / "b.bin").stat().st_mtime_ns == before, "what had not changed was fetched again"


def _worker(rank: int, world: int, port: int, late: dict[int, float], loading: float, said: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    set_group_timeout(2)
    group = dist.new_group(backend="gloo")  # DeepSpeed makes its own group as well
    collectives = Collectives(f"node-{rank}", loading)
    time.sleep(late.get(rank, 0.0))
    try:
        collectives.rendezvous("its model is loaded")
        dist.all_reduce(torch.ones(1), group=group)
        said.send("met")
    except Exception as error:
        said.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def meet(late: dict[int, float], loading: float, world: int = 3) -> dict[int, str]:
    """Return what each worker reports when it is `late` by a number of seconds."""
    context, port = multiprocessing.get_context("fork"), free_port()
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    workers = [
        context.Process(target=_worker, args=(rank, world, port, late, loading, ends[rank][1])) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    found = {}
    for rank in range(world):
        if late.get(rank, 0.0) < loading:
            assert ends[rank][0].poll(60), f"worker {rank} says nothing"
            found[rank] = ends[rank][0].recv()
    for worker in workers:
        worker.kill()
        worker.join()
    return found


def test_a_worker_that_loads_longer_than_a_collective_may_take_is_waited_for() -> None:
    assert meet({1: 4.0}, loading=60) == {0: "met", 1: "met", 2: "met"}


def test_missing_workers_are_named_with_their_nodes() -> None:
    found = meet({1: 600.0}, loading=2)
    assert "worker 1 (node node-1) of 3" in found[0] and "loadingTimeoutSeconds" in found[0]
    assert found[0].startswith("WorkersMissing")


def test_the_others_name_the_first_worker() -> None:
    found = meet({0: 600.0}, loading=2)
    assert all("worker 0 (node node-0) of 3" in found[rank] for rank in (1, 2)), found


def _node(rank: int, job: dict[str, Any], directory: Path) -> tuple[Any, ...]:
    """Return the data that the worker of one node prepares, and its log, when the driver could not prepare it."""
    run = RunConfig.model_validate(
        {"job": job, "root": "/pvc/x", "baseDir": str(directory), "cacheDir": str(directory / f"node-{rank}")}
    )
    said: list[str] = []
    storage, place = Storage(str(directory / "claim")), Placement(rank, 0, 2, accelerator=False)
    files = NodeFiles(run, storage, place, Collectives(f"node-{rank}"), 2, said.append)
    tokenizer = AutoTokenizer.from_pretrained(job["spec"]["model"]["path"])

    def work() -> Prepared:
        if rank:
            (directory / "rows.jsonl").unlink()  # the second node has no access to the sources
        spec: Any = run.job.spec.stages[0].spec
        return prepare(spec, tokenizer, None, where="stages[0].sft", num_proc=1, **directories(run))

    prepared = files.prepare_once(work)
    return prepared.train[0]["input_ids"], prepared.report.seconds, prepared.key, said


def test_data_that_the_run_itself_makes_is_prepared_by_one_node(base_job: dict[str, Any], tmp_path: Path) -> None:
    base_job["spec"]["storage"] = {"uri": "pvc://claim/x"}
    first, second = on_two_workers(lambda rank: _node(rank, base_job, tmp_path))
    assert first[:3] == second[:3], "the second node has prepared other data, or by itself"
    assert first[3] == [] and len(second[3]) == 2 and all("fetched" in line for line in second[3])


def test_ranks_in_torchs_words() -> None:
    assert missing_ranks("Ranks 1, 2 failed to pass monitoredBarrier in 1000 ms") == [1, 2]
    assert missing_ranks("[Rank 0]: Rank 3 failed to pass monitoredBarrier in 7200000 ms") == [3]
    assert missing_ranks("Connection closed by peer [127.0.0.1]:2345") == []


def test_a_missing_worker_is_tried_again() -> None:
    from finetune_trainer.errors import WorkersMissing

    assert _kind(WorkersMissing("worker 1 did not get so far")) is Kind.LOST


def test_an_entry_says_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert [entry.path for entry in list_entries(tmp_path)] == ["a", "b"]
    assert list_entries(tmp_path)[1] == Entry("b", 0, link="a")


def test_the_time_limit_of_collectives_goes_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_group, "asked", dict)  # the answer of a running cluster
    job = copy.deepcopy(JOB)
    job["spec"]["runPolicy"] = {"ddpTimeout": 77}
    places = {"root": str(tmp_path), "baseDir": "/", "cacheDir": str(tmp_path)}
    run = RunConfig.model_validate({"job": job, **places})
    fit = worker_group.WorkerGroup(
        run, Workers(2, 2, False, 1), print, threading.Event(), lambda stall: pytest.fail(str(stall))
    )
    assert fit._trainer([], None).backend_config.timeout_s == 77
    assert RunPolicy().ddp_timeout == 1800 and RunPolicy().loading_timeout_seconds == 7200
