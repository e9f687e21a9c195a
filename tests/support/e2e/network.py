"""The network of a cluster on one machine: a bridge of this host and a network namespace for each node.

Nodes, their pods, this host and the API server's service address are neighbours on one level-2 network, so no packet is
routed, translated or filtered, and no rule of this machine's firewall changes.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "finetune-e2e0"
POD_BRIDGE = "pods0"
GATEWAY, PREFIX, SUBNET = "10.88.76.1", 22, "10.88.76.0/22"
SERVICE_RANGE, API_ADDRESS = "10.88.80.0/24", "10.88.80.1"
"""The API server listens at the address of its Service, so that pods reach it without a proxy."""


@dataclass(frozen=True)
class NodeNetwork:
    """The addresses and devices of a node, by its number from 1."""

    number: int

    @property
    def namespace(self) -> str:
        return f"finetune-e2e-{self.number}"

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.namespace

    @property
    def address(self) -> str:
        return f"10.88.76.{10 + self.number}"

    @property
    def cable(self) -> str:
        """Name of the host's end of the veth pair."""
        return f"ft-e2e-{self.number}"

    def pods(self) -> dict[str, str]:
        """The addresses of its pods, in the format of the CNI plugin `host-local`."""
        network = f"10.88.{76 + self.number}"
        return {"subnet": SUBNET, "rangeStart": f"{network}.10", "rangeEnd": f"{network}.250", "gateway": GATEWAY}

    def make(self) -> None:
        """Create the namespace, with the node's address on the bridge of its pods."""
        inside = ["ip", "-netns", self.namespace]
        run("ip", "netns", "add", self.namespace)
        run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        run("ip", "link", "set", self.cable, "master", BRIDGE, "up")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "add", POD_BRIDGE, "type", "bridge")
        run(*inside, "link", "set", "eth0", "master", POD_BRIDGE, "up")
        run(*inside, "address", "add", f"{self.address}/{PREFIX}", "dev", POD_BRIDGE)
        run(*inside, "link", "set", POD_BRIDGE, "up")
        run(*inside, "route", "add", "default", "via", GATEWAY)

    def unplug(self) -> None:
        """Drop all packets to and from the node."""
        run("ip", "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        run("ip", "link", "set", self.cable, "up")

    def remove(self) -> None:
        """Remove the namespace if it exists; its veth pair is removed after its last process ends."""
        run("ip", "link", "delete", self.cable, check=False)
        run("ip", "netns", "delete", self.namespace, check=False)


def make_bridge() -> None:
    """Create the host's bridge, at which pods reach the API server, DNS and S3."""
    remove_bridge()
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{GATEWAY}/{PREFIX}", "dev", BRIDGE)
    run("ip", "address", "add", f"{API_ADDRESS}/32", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


def remove_bridge() -> None:
    run("ip", "link", "delete", BRIDGE, check=False)


def run(*command: str, check: bool = True, seconds: float = 120) -> str:
    """Run a system command and return its output.

    Raises:
        AssertionError: it failed and `check` is set; the message is its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
