"""Of two jobs in two namespaces, neither can reach the other's ports, objects or storage.

The tests run first without and then with enforcement of NetworkPolicies by kube-router.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes import client
from support.cluster.access import Access, namespace_of
from support.cluster.finetune_jobs import Jobs
from support.cluster.kube_assets import MissingAsset, assets
from support.e2e.cluster_jobs import RUNS, apply, give_credentials, long_job
from support.e2e.clusters import Cluster
from support.e2e.one_machine import OneMachine
from support.e2e.operator_pod import OperatorPod
from support.storage.s3_server import S3Server

from finetune_api.labels import JOB_LABEL
from finetune_api.report import PORT, REPORT_PATH

Json = dict[str, Any]
NAME, SECONDS = "same", 300
OPEN_PORTS = """
import json
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").read().splitlines()[1:]]
own = {row[1] for row in rows if row[3] == "0A"}
print(json.dumps(sorted({int(place.split(":")[1], 16) for place in own if place.split(":")[0] not in
    ("0100007F", "00000000000000000000000001000000")})))
"""
REACHED = """
import json, socket, sys
def reaches(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=3).close()
        return True
    except OSError:
        return False
print(json.dumps([port for port in json.loads(sys.argv[2]) if reaches(port)]))
"""
REPORT = f"""
import sys, urllib.request, urllib.error
token = open("/etc/finetune-token/auth_token").read().strip() if sys.argv[2] == "own" else sys.argv[2]
request = urllib.request.Request(f"http://{{sys.argv[1]}}:{PORT}{REPORT_PATH}",
                                 headers={{"Authorization": f"Bearer {{token}}"}})
try:
    print(urllib.request.urlopen(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""
JOIN = """
import os, sys
os.environ["RAY_ADDRESS"] = sys.argv[1] + ":6379"
import ray
try:
    ray.init(logging_level="ERROR", log_to_driver=False)
    print("joined")
except BaseException as error:
    print("refused", type(error).__name__, str(error)[:300])
"""


@dataclass(frozen=True)
class Team:
    """A namespace with a running job, and the job's pod."""

    admin: Access
    namespace: str
    pod: str
    address: str

    def python(self, program: str, *arguments: str) -> str:
        """Run a Python program in the container of the job."""
        done = self.admin.kubectl(
            "exec", f"--namespace={self.namespace}", self.pod, "--", "python", "-c", program, *arguments
        )
        return done.stdout.strip()


@pytest.fixture(scope="module")
def teams(cluster: Cluster, operator: OperatorPod, s3: S3Server) -> Iterator[tuple[Team, Team]]:
    """Start two jobs of the same name in two namespaces."""
    with namespace_of(cluster.admin, "red") as red, namespace_of(cluster.admin, "blue") as blue:
        for namespace in (red, blue):
            give_credentials(cluster.admin, namespace, s3)
            apply(cluster.admin, namespace, long_job(NAME, cluster.pod_template, steps=100_000, save=50, nodes=1))
        with cluster.admin.client() as api:
            first, second = (_team(cluster.admin, api, namespace) for namespace in (red, blue))
        yield first, second


def _team(admin: Access, api: client.ApiClient, namespace: str) -> Team:
    jobs = Jobs(client.CustomObjectsApi(api), namespace)
    jobs.until(lambda status: bool(status.get("lastCheckpoint")), NAME, SECONDS)
    selector = f"{JOB_LABEL}={NAME},batch.kubernetes.io/job-completion-index=0"
    (pod,) = client.CoreV1Api(api).list_namespaced_pod(namespace, label_selector=selector).items
    return Team(admin, namespace, pod.metadata.name, pod.status.pod_ip)


@pytest.mark.timeout(900, func_only=True)
def test_tokens_keep_others_out_where_no_policy_is_enforced(teams: tuple[Team, Team]) -> None:
    """The report port and Ray accept only the token of their own run."""
    red, blue = teams
    assert red.python(REPORT, red.address, "own") == "200"
    assert blue.python(REPORT, red.address, "own") == "401" and blue.python(REPORT, red.address, "x") == "401"
    assert blue.python(JOIN, red.address).startswith("refused")
    assert red.python(JOIN, red.address) == "joined"


def test_no_pod_of_a_job_has_a_right_at_the_api_server(cluster: Cluster, teams: tuple[Team, Team]) -> None:
    red, blue = teams
    assert blue.python("import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))") == "False"
    for kind in ("secrets", "configmaps", "finetunejobs.finetune.dev", "pods"):
        account = f"--as=system:serviceaccount:{blue.namespace}:default"
        for namespace in (red.namespace, blue.namespace):
            asked = ["auth", "can-i", "get", kind, f"--namespace={namespace}", account]
            assert cluster.admin.kubectl(*asked, check=False).stdout.strip() == "no"


def test_jobs_of_one_name_have_directories_of_their_own(s3: S3Server, teams: tuple[Team, Team]) -> None:
    s3.fs.invalidate_cache()
    for team in teams:
        run = json.loads(s3.fs.cat_file(f"{RUNS}/{team.namespace}/{NAME}/run.json"))
        assert run["job"]["metadata"]["namespace"] == team.namespace
        assert run["root"] == f"s3://{RUNS}/{team.namespace}/{NAME}"


def test_no_port_is_reached_once_policies_are_enforced(cluster: Cluster, teams: tuple[Team, Team]) -> None:
    red, blue = teams
    ports = red.python(OPEN_PORTS)
    assert {6379, PORT} <= set(json.loads(ports)), ports
    assert json.loads(blue.python(REACHED, red.address, ports)), "a port that nobody reaches proves nothing"
    _enforce(cluster)
    assert json.loads(blue.python(REACHED, red.address, ports)) == []
    assert blue.python(REPORT, blue.address, "own") == "200"


def _enforce(cluster: Cluster) -> None:
    if not isinstance(cluster, OneMachine):
        pytest.skip("kind's own network enforces policies from its version 0.24 on, and then from the start")
    if shutil.which("ipset") is None or shutil.which("iptables") is None:
        pytest.skip("kube-router needs ipset and iptables: apt-get install ipset iptables")
    try:
        kube_router = assets(["kube-router"])["kube-router"]
    except (MissingAsset, subprocess.CalledProcessError) as missing:
        pytest.skip(str(missing))
    for node in cluster.nodes:
        node.enforce_policies(kube_router)
