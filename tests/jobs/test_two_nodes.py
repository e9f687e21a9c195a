"""Jobs on two nodes with separate caches: one node prepares the data, and the other one copies it."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.jobs.two_nodes import Node, TwoNodes, require_namespaces

REPOSITORY = "models--acme--tiny"


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    require_namespaces()


def in_hub_cache(model: Path, cache: Path) -> None:
    """Put a saved model into a node's Hub cache, in the layout of huggingface_hub."""
    repository = cache / "huggingface/hub" / REPOSITORY
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for directory in (snapshot, blobs, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    for file in model.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")


def job_of(base: dict[str, Any]) -> dict[str, Any]:
    base["spec"] |= {"model": {"hub": "acme/tiny"}, "resources": {"nodes": 2, "workersPerNode": 1}}
    return base


def prepared(node: Node) -> dict[str, bytes]:
    """Return the preparation reports in a node's cache by key; their durations tell two preparations apart."""
    found = (node.cache / "finetune/prepared").glob("[0-9a-f]*/report.json")
    return {path.parent.name: path.read_bytes() for path in found}


def test_one_node_tokenises_and_a_slow_one_gets_data_and_weights(
    base_job: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """The second node gets its weights later than `ddpTimeout`, because loading is not part of the timeout."""
    limit, job = 15, job_of(base_job)
    job["spec"]["runPolicy"] = {"ddpTimeout": limit}
    in_hub_cache(tiny_model, tmp_path / "one")
    (tmp_path / "two/huggingface/hub").mkdir(parents=True)
    slow = FileLock(tmp_path / "two/huggingface/hub" / f"{REPOSITORY}.lock")
    with slow, TwoNodes(job, tmp_path) as nodes:
        wait_for(nodes, "node two fetched prepared")
        time.sleep(limit + 3)  # the second node downloads without the first
        assert nodes.head.process.poll() is None, nodes.output
        slow.release()
        assert nodes.wait(240) == 0, nodes.output
        first, second = prepared(nodes.head), prepared(nodes.worker)
        assert len(first) == 1 and second == first, "the second node has tokenised by itself"
        blobs = [node.cache / "huggingface/hub" / REPOSITORY / "blobs" for node in (nodes.head, nodes.worker)]
        here, there = ({path.name: path.read_bytes() for path in one.iterdir()} for one in blobs)
        assert here == there and len(here) > 3
        travelled = re.findall(r"node (\S+) fetched ([^/:\s]+)", nodes.output)
        assert travelled == [("two", "rows"), ("two", "prepared"), ("two", REPOSITORY)], nodes.output


@pytest.mark.long
def test_an_error_of_one_node_ends_the_others_at_once(
    base_job: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    job = job_of(base_job)
    shutil.copytree(tiny_model, tmp_path / "one/model")
    job["spec"]["model"] = {"path": str(tmp_path / "cache/model")}  # exists on the first node only
    with TwoNodes(job, tmp_path) as nodes:
        wait_for(nodes, "sft: 12 of 12 rows")
        began = time.monotonic()
        assert nodes.wait(240) == 2, nodes.output
        assert time.monotonic() - began < 120, "the first node has waited for the second one"
        assert str(tmp_path / "cache/model") in nodes.output.partition("failed:")[2], nodes.output


@pytest.mark.long
def test_nodes_of_one_volume_copy_nothing(base_job: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    in_hub_cache(tiny_model, tmp_path / "one")
    with TwoNodes(job_of(base_job), tmp_path, shared=True) as nodes:
        assert nodes.wait(240) == 0, nodes.output
        assert " fetched " not in nodes.output


def wait_for(nodes: TwoNodes, words: str, seconds: float = 240) -> None:
    """Wait until the driver's output contains the text."""
    deadline = time.monotonic() + seconds
    while words not in nodes.output:
        assert nodes.head.process.poll() is None and time.monotonic() < deadline, nodes.output
        time.sleep(0.2)
