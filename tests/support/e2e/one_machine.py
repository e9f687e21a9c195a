"""A complete Kubernetes on this machine: the control plane of `tests/cluster`, a scheduler, nodes, cluster DNS."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.cluster.access import Access
from support.cluster.control_plane import ControlPlane
from support.cluster.servers import Server
from support.e2e import cgroups, network
from support.e2e.images import (
    OPERATOR_IMAGE,
    TRAINER_IMAGE,
    operator_image,
    pause_image,
    trainer_image,
    trainer_volumes,
)
from support.e2e.network import API_ADDRESS, BRIDGE, GATEWAY, SERVICE_RANGE
from support.e2e.node import CLUSTER_DOMAIN, Node

CONTROLLERS = ("node-lifecycle-controller", "taint-eviction-controller")
PARTS = ("kubelet", "kube-scheduler", "coredns", "bridge", "loopback", "host-local")


class OneMachine:
    """A context manager: entering starts the cluster, leaving removes it.

    Args:
        binaries: paths of `PARTS`.
        nodes: number of nodes.
    """

    operator_image, trainer_image = OPERATOR_IMAGE, TRAINER_IMAGE
    gateway = GATEWAY
    """Address of this machine for pods."""

    def __init__(self, directory: Path, binaries: dict[str, Path], nodes: int = 2) -> None:
        self.directory, self._binaries, self._stack = directory, binaries, ExitStack()
        certificate, key = _client_certificate(directory)
        options = [
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={certificate}",
            f"--kubelet-client-key={key}",
        ]
        self.control_plane = ControlPlane(
            directory, options, CONTROLLERS, address=API_ADDRESS, port=443, service_range=SERVICE_RANGE
        )
        self.admin: Access = self.control_plane.admin
        self.nodes = [
            Node(number, directory / f"node-{number}", self.admin, binaries, certificate)
            for number in range(1, nodes + 1)
        ]

    def __enter__(self) -> OneMachine:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def pod_template(self) -> dict[str, object]:
        """Return the pod template that jobs need on this cluster's nodes."""
        return trainer_volumes()

    def restart_apiserver(self) -> None:
        """Kill the API server and start it again at once."""
        self.control_plane.restart_apiserver(kill=True, controllers=False)

    def import_image(self, archive: Path) -> None:
        """Import an image on every node."""
        for node in self.nodes:
            node.import_image(archive)

    def tag_image(self, image: str, name: str) -> None:
        """Add a name to an image."""
        for node in self.nodes:
            node.ctr("images", "tag", f"{image}", name)

    def _start(self) -> None:
        self._stack.callback(cgroups.remove)
        self._stack.callback(network.remove_bridge)
        network.make_bridge()
        self._stack.enter_context(self.control_plane)
        kubeconfig = self.admin.kubeconfig(self.directory / "parts.kubeconfig")
        self._stack.enter_context(self._running("kube-scheduler", self._scheduler(kubeconfig)))
        self._stack.enter_context(self._running("coredns", self._dns(kubeconfig), self._dns_answers))
        for node in self.nodes:
            self._stack.enter_context(node)
        for make, name in ((pause_image, "pause"), (operator_image, "operator"), (trainer_image, "trainer")):
            self.import_image(make(self.directory / f"{name}.tar"))
        for node in self.nodes:
            node.start_kubelet()

    @contextmanager
    def _running(self, name: str, options: list[str], ready: object = None) -> Iterator[Server]:
        server = Server(name, [str(self._binaries[name]), *options], self.directory / f"{name}.log")
        server.start(ready if callable(ready) else lambda: True)
        try:
            yield server
        finally:
            server.stop()

    def _scheduler(self, kubeconfig: Path) -> list[str]:
        return [f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0"]

    def _dns(self, kubeconfig: Path) -> list[str]:
        """Return the options of DNS whose answers are cached for a second, so that new names soon resolve."""
        corefile = self.directory / "Corefile"
        corefile.write_text(f""".:53 {{
  bind {GATEWAY}
  kubernetes {CLUSTER_DOMAIN} {{
    kubeconfig {kubeconfig}
    ttl 1
  }}
  errors
}}
""")
        return [f"-conf={corefile}"]

    def _dns_answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex((GATEWAY, 53)) == 0


def _client_certificate(directory: Path) -> tuple[Path, Path]:
    """Create the API server's client certificate and key; kubelets trust the certificate as a CA."""
    certificate, key = directory / "kubelet-client.crt", directory / "kubelet-client.key"
    subject = "/O=system:masters/CN=kube-apiserver-kubelet-client"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    usage = ["-addext", "extendedKeyUsage=clientAuth"]
    command = ["openssl", "req", *kind, "-subj", subject, *usage, "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def left_behind(directory: Path) -> list[str]:
    """Return what a removed cluster has left on this machine; `directory` was the cluster's."""
    links = [link["ifname"] for link in json.loads(network.run("ip", "-json", "link"))]
    names = [name.split()[0] for name in network.run("ip", "netns", "list").splitlines()]
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    processes = [command for pid in _pids() if str(directory) in (command := cgroups.command_of(pid))]
    groups = [root / cgroups.PARENT for root in cgroups.hierarchies() if (root / cgroups.PARENT).exists()]
    loops = network.run("losetup", "--list", "--noheadings", "--output=BACK-FILE").split()
    return [
        *(f"network device {name}" for name in links if name == BRIDGE or name.startswith("ft-e2e-")),
        *(f"network namespace {name}" for name in names if name.startswith("finetune-e2e-")),
        *(f"mount {place}" for place in mounts if place.startswith(str(directory))),
        *(f"loop device of {file}" for file in loops if file.startswith(str(directory))),
        *(f"process {command}" for command in processes),
        *(f"cgroup {group}" for group in groups),
    ]


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
