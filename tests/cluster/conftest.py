"""Fixtures of the tests against a real API server. See `control_plane`, `kubelet_stand_in` and `faulty_proxy`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.control_plane import ControlPlane
from support.cluster.faulty_proxy import FaultyProxy
from support.cluster.finetune_jobs import Jobs
from support.cluster.helm_chart import Installed, installed
from support.cluster.kube_assets import MissingAsset
from support.cluster.kubelet_stand_in import KubeletStandIn
from support.cluster.operator_process import FAST, OperatorProcess

ROOT = Path(__file__).parents[2]
CRD_FILE = ROOT / "crds" / "finetune.dev_finetunejobs.yaml"
TEST_SECONDS = 120
STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Exclude fixtures from the time limits of tests, because the first fixture may build Kubernetes.

    Tests with the operator run last: it reconciles all jobs, also those of tests that write statuses themselves.
    """
    items.sort(key=lambda item: "operator" in getattr(item, "fixturenames", ()))
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_SECONDS, func_only=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if STARTED in config.stash:
        terminalreporter.write_line(f"control plane ready after {config.stash[STARTED]:.1f} s")


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[ControlPlane]:
    """Start etcd, kube-apiserver and kube-controller-manager for the whole session."""
    try:
        definition = yaml.safe_load(CRD_FILE.read_text())
        made = ControlPlane(tmp_path_factory.mktemp("control-plane"), definitions=[definition])
    except MissingAsset as missing:
        pytest.skip(str(missing))
    with made:
        pytestconfig.stash[STARTED] = made.start_seconds
        yield made


@pytest.fixture(scope="session")
def admin(control_plane: ControlPlane) -> Access:
    """Return cluster-admin access."""
    return control_plane.admin


@pytest.fixture(scope="session")
def api(admin: Access) -> Iterator[client.ApiClient]:
    """Return the administrator's client, for example for `client.BatchV1Api(api)`."""
    with admin.client() as made:
        yield made


@pytest.fixture(scope="session")
def core(api: client.ApiClient) -> client.CoreV1Api:
    """Return the API of the core group: pods, Nodes, Events and others."""
    return client.CoreV1Api(api)


@pytest.fixture(scope="session")
def finetune_jobs(api: client.ApiClient) -> client.CustomObjectsApi:
    """Return the API of custom objects; the control plane serves the committed CRD."""
    return client.CustomObjectsApi(api)


@pytest.fixture(scope="session")
def release(
    admin: Access, finetune_jobs: client.CustomObjectsApi, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installed]:
    """Install the chart with helm for all namespaces; the CRD is that of `finetune_jobs`."""
    try:
        with installed(admin, tmp_path_factory.mktemp("helm"), {"crds": {"enabled": False}}) as made:
            yield made
    except MissingAsset as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def operator_access(release: Installed) -> Access:
    """Return the operator's access: a token of the chart's service account, with only the chart's RBAC rules."""
    return release.access


@pytest.fixture(scope="session")
def operator(
    release: Installed, operator_access: Access, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """Run the operator for all namespaces, with the settings and the RBAC rules of the chart."""
    directory = tmp_path_factory.mktemp("operator")
    with OperatorProcess(operator_access, directory, **(release.environment | FAST)) as running:
        yield running


@pytest.fixture
def jobs(finetune_jobs: client.CustomObjectsApi, namespace: str, operator: OperatorProcess) -> Jobs:
    """Return the FineTuneJobs of the test's namespace while the operator runs."""
    return Jobs(finetune_jobs, namespace)


@pytest.fixture
def namespace(admin: Access) -> Iterator[str]:
    """Create a namespace for one test."""
    with namespace_of(admin, "test") as name:
        yield name


@pytest.fixture
def kubelet(core: client.CoreV1Api) -> KubeletStandIn:
    """Return a stand-in of scheduler and kubelet that changes the states of pods."""
    return KubeletStandIn(core)


@pytest.fixture
def proxy(control_plane: ControlPlane) -> Iterator[FaultyProxy]:
    """Start a proxy in front of the API server that counts requests and injects faults."""
    with FaultyProxy(control_plane.url, control_plane.ca_file, control_plane.key_file) as made:
        yield made
