"""Jobs on two nodes with a cache each: one node prepares, the other one gets what it has prepared."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from two_nodes import Node, TwoNodes, require_namespaces

REPOSITORY = "models--acme--tiny"


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    require_namespaces()


def in_hub_cache(model: Path, cache: Path) -> None:
    """Put a saved model into a node's cache of the hub, as huggingface_hub keeps it."""
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
    """Reports of preparations in a node's cache, by key. They tell how long it took: each preparation has its own."""
    found = (node.cache / "finetune/prepared").glob("[0-9a-f]*/report.json")
    return {path.parent.name: path.read_bytes() for path in found}


def test_one_node_tokenises_and_the_other_one_gets_data_and_weights(
    base_job: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    in_hub_cache(tiny_model, tmp_path / "one")
    with TwoNodes(job_of(base_job), tmp_path) as nodes:
        assert nodes.wait(240) == 0, nodes.output
        first, second = prepared(nodes.head), prepared(nodes.worker)
        assert len(first) == 1 and second == first, "the second node has tokenised by itself"
        weights = [node.cache / "huggingface/hub" / REPOSITORY / "blobs" for node in (nodes.head, nodes.worker)]
        assert [sorted(path.name for path in one.iterdir()) for one in weights] == [
            sorted(path.name for path in weights[0].iterdir())
        ] * 2
        got = re.findall(r"node two got (\S+): ([\d.]+ \S+)", nodes.output)
        assert [name.partition("/")[0] for name, _ in got] == ["rows", "prepared", REPOSITORY], nodes.output
        assert "node one got" not in nodes.output
