"""A driver in a Ray cluster of several nodes: the node of its channel, and its message if workers find no resources."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, os
import ray
from ray.cluster_utils import Cluster
from ray._private.state import actors
from ray.util import placement_group
from finetune_trainer.forks.start import patch_ray
from finetune_trainer.launch.placement import PlacementWatch
from finetune_trainer.progress.channel import open_channel
from finetune_trainer.runtime import apply_environment, quiet_environment
apply_environment(quiet_environment(accelerator=False))
patch_ray()
share = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**share, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(**share)
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
channels = [open_channel() for _ in range(4)]
ray.get([channel.stop_requested.remote() for channel in channels])
places = {actor["Address"]["NodeID"] for actor in actors().values()}
group, said, now = placement_group([{"CPU": 1, "finetune_worker": 1}] * 2), [], [0.0]
looks = PlacementWatch(said.append, lambda: now[0])
for now[0] in (4, 6, 12, 18, 25):
    looks.poll()
early, _ = list(said), cluster.add_node(**{**share, "num_cpus": 2}, resources={"finetune_worker": 2})
group.wait(30)
now[0] = 40
looks.poll()
print(json.dumps({"here": ray.get_runtime_context().get_node_id(), "places": sorted(places), "early": early,
                  "said": said}))
os._exit(0)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what a driver on a cluster of three nodes reports."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_the_channel_is_on_the_driver_s_node(found: dict[str, Any]) -> None:
    """The loss of another node must not end the channel and with it the driver."""
    assert found["places"] == [found["here"]]


def test_workers_without_room_are_told(found: dict[str, Any]) -> None:
    asked = "no room for 2 workers of 1 CPU, 1 finetune_worker each: 3 nodes offer 1 CPU; 1 CPU; 1 CPU"
    assert found["early"] == [asked] and found["said"] == [asked, ""]
