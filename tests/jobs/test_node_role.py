"""A pod's role in its job's Ray cluster, detected from the environment that its engine sets."""

from __future__ import annotations

from finetune_api.cluster import Resources
from finetune_trainer.launch.node_role import NodeRole, node_role, replaces_nodes

RESOURCES = Resources.model_validate({"workersPerNode": 2})
PLACES = '--resources={"finetune_worker": 2}'
HEAD = """ray start --head  --block  --dashboard-agent-listen-port=52365  --dashboard-host=0.0.0.0 --memory=5
 --metrics-export-port=8080  --num-cpus=1  --resources='{"other": 1}' """
WORKER = "ray start  --address=tiny-head-svc.team.svc.cluster.local:6379  --block  --metrics-export-port=8080 "


def of(command: str) -> NodeRole:
    return node_role(RESOURCES, {"KUBERAY_GEN_RAY_START_CMD": command})


def test_the_first_pod_of_a_job_is_the_head() -> None:
    found = node_role(RESOURCES, {"FINETUNE_HEAD_ADDRESS": "tiny-1-0.x:6379", "JOB_COMPLETION_INDEX": "0"})
    assert found.head and not found.watched and found.environment == {}
    assert found.address.endswith(":6379") and not found.address.startswith("tiny")
    assert {"--head", "--include-dashboard=false", PLACES} <= set(found.options)


def test_the_others_of_a_job_join_it() -> None:
    found = node_role(RESOURCES, {"FINETUNE_HEAD_ADDRESS": "tiny-1-0.x:6379", "JOB_COMPLETION_INDEX": "3"})
    assert not found.head and found.address == "tiny-1-0.x:6379"
    assert {"--address=tiny-1-0.x:6379", PLACES} <= set(found.options)


def test_kuberay_s_head_has_a_dashboard_and_offers_places() -> None:
    """A node detects its own CPUs, because KubeRay would report the requested one CPU of a node of 64."""
    found = of(HEAD)
    assert found.head and found.watched and found.environment
    assert {"--head", "--dashboard-host=0.0.0.0", "--memory=5", PLACES} <= set(found.options)
    assert "--block" not in found.options and "--num-cpus=1" not in found.options
    assert len([option for option in found.options if option.startswith(("--resources", "--num-cpus"))]) == 2


def test_kuberay_s_workers_join_at_its_address() -> None:
    found = of(WORKER)
    assert not found.head and found.address == "tiny-head-svc.team.svc.cluster.local:6379"
    assert found.options[0] == f"--address={found.address}" and "--block" not in found.options


def test_kuberay_replaces_lost_nodes() -> None:
    assert replaces_nodes({"KUBERAY_GEN_RAY_START_CMD": WORKER}) and not replaces_nodes({})
