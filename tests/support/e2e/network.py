"""The network of a cluster on one machine: a bridge of this host, and a network namespace for each node behind it.

Nodes, their pods, this host and the API server's service address are neighbours on one level-2 network, so nothing is
routed, translated or filtered, and no rule of this machine's firewall is touched.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "finetune-e2e0"
POD_BRIDGE = "pods0"
GATEWAY, PREFIX, SUBNET = "10.88.76.1", 22, "10.88.76.0/22"
SERVICE_RANGE, API_ADDRESS = "10.88.80.0/24", "10.88.80.1"
"""The API server listens at its own service's address, so that pods find it with no proxy on the way."""


@dataclass(frozen=True)
class NodeNetwork:
    """A node's place in the network, by its number from 1."""

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
        """Name of the host's end."""
        return f"ft-e2e-{self.number}"

    def pods(self) -> dict[str, str]:
        """The addresses of its pods, as the CNI plugin `host-local` wants them."""
        network = f"10.88.{76 + self.number}"
        return {"subnet": SUBNET, "rangeStart": f"{network}.10", "rangeEnd": f"{network}.250", "gateway": GATEWAY}

    def make(self) -> None:
        """The namespace, with the node's address on the bridge that its pods will join."""
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
        """Packets to the node, and from it, are lost without a word."""
        run("ip", "link", "set", self.cable, "down")

    def plug_in(self) -> None:
        run("ip", "link", "set", self.cable, "up")

    def remove(self) -> None:
        """Nothing where it is gone; the cable goes with the namespace once nothing runs in there."""
        run("ip", "link", "delete", self.cable, check=False)
        run("ip", "netns", "delete", self.namespace, check=False)


def make_bridge() -> None:
    """The host's bridge, at which pods find the API server, DNS and S3."""
    remove_bridge()
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{GATEWAY}/{PREFIX}", "dev", BRIDGE)
    run("ip", "address", "add", f"{API_ADDRESS}/32", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


def remove_bridge() -> None:
    run("ip", "link", "delete", BRIDGE, check=False)


def run(*command: str, check: bool = True, seconds: float = 120) -> str:
    """Run a command of the system; its output.

    Raises:
        AssertionError: it failed and `check` is set; the message is what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
