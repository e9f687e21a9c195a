"""A Kubernetes node on this machine: containerd and the kubelet in separate namespaces.

The namespaces and mounts of the node and all its other processes end with its first process, so that a test can
simulate a power failure, and nothing remains after the tests. Its disk is a file of limited size.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import yaml
from support.cluster.access import Access
from support.cluster.servers import Server
from support.e2e import cgroups
from support.e2e.images import PAUSE_IMAGE
from support.e2e.network import GATEWAY, POD_BRIDGE, SERVICE_RANGE, NodeNetwork, run

NEEDED = ("containerd", "ctr", "runc", "ip", "nsenter", "unshare", "openssl", "mkfs.ext4")
CLUSTER_DOMAIN = "cluster.local"
SPARED = 256 << 20
"""Bytes of a full disk that are written in small pieces at the end."""
DISK_BYTES = 8 << 30
"""Maximum size of the node's images, containers and volumes; the file is sparse and starts small."""
SOCKET = "/run/containerd/containerd.sock"
KUBELET_HOME = Path("/var/lib/kubelet")
"""The kubelet needs this path for its device plugins, independent of its root directory."""
_FIRST_PROCESS = """set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs {home}
mount -o loop {disk} {root}
: > {root}/up
while :; do sleep 86400 & wait $!; done
"""


def missing() -> str:
    """Return why this machine cannot run a node, or an empty text."""
    if os.geteuid() != 0:
        return "a node needs root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(absent)} here: apt-get install containerd runc iproute2 openssl e2fsprogs" if absent else ""


class Node:
    """A context manager: entering starts the node without its kubelet, leaving removes it completely.

    Args:
        number: from 1; it is part of the node's name and addresses.
        binaries: paths of `kubelet`, `bridge`, `loopback` and `host-local`.
        client_ca: the CA of the client certificate that the API server presents to the kubelet.
    """

    def __init__(
        self, number: int, directory: Path, access: Access, binaries: dict[str, Path], client_ca: Path
    ) -> None:
        self.name, self.network = f"node-{number}", NodeNetwork(number)
        self.directory, self.access, self.binaries, self.client_ca = directory, access, binaries, client_ca
        self.root = directory / "root"
        """Mount point of the node's disk, for the node's own processes."""
        for name in ("cni-bin", "cni-conf", "root"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._disk = directory / "disk"
        self._archives: list[Path] = []
        self._configure_network()
        self._containerd_config().write_text(_CONTAINERD.format(here=directory, root=self.root, pause=PAUSE_IMAGE))
        self._kubelet_config().write_text(yaml.safe_dump(self._kubelet_settings()))
        self._holder = Server(self.name, self._holder_command(), directory / "node.log")
        self._containerd: Server | None = None
        self._kubelet: Server | None = None
        self._firewall: Server | None = None

    def __enter__(self) -> Node:
        self.network.remove()
        self.network.make()
        with self._disk.open("wb") as disk:
            disk.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", str(self._disk))
        self._boot()
        return self

    def __exit__(self, *_: object) -> None:
        self.lose()
        self.network.remove()
        cgroups.remove(self.name)
        self._disk.unlink(missing_ok=True)
        if KUBELET_HOME.exists() and not any(KUBELET_HOME.iterdir()):
            KUBELET_HOME.rmdir()

    # faults of a node

    def start_kubelet(self) -> None:
        """Start the kubelet and wait until the node is ready."""
        self._kubelet = Server("kubelet", self._inside(*self._kubelet_command()), self.directory / "kubelet.log")
        self._kubelet.start(self._ready, timeout=120)

    def stop_kubelet(self) -> None:
        """Stop the kubelet while its pods continue to run."""
        _kill(self._kubelet)

    def lose(self) -> None:
        """Simulate a power failure: kill all processes of the node, and drop packets to it."""
        if self.network.path.exists():
            self.network.unplug()
        for server in (self._holder, self._kubelet, self._containerd, self._firewall):
            _kill(server)

    def bring_back(self) -> None:
        """Boot the node again with the data on its disk."""
        self.network.plug_in()
        self._boot()
        self.start_kubelet()

    def fill_disk(self) -> None:
        """Fill the disk completely: allocate most of it at once, and write the rest in small pieces."""
        filler = self.root / "filler"
        run(*self._inside("fallocate", "-l", str(max(self.free_bytes() - SPARED, 1)), str(filler)))
        run(*self._inside("sh", "-c", f"cat /dev/zero >> {filler}"), check=False)

    def free_disk(self) -> None:
        """Free the disk and import the images again: the kubelet may have removed some, and no registry has them."""
        run(*self._inside("rm", "-f", str(self.root / "filler")))
        for archive in self._archives:
            self._import(archive)

    def free_bytes(self) -> int:
        """Return the free bytes of the disk."""
        out = run(*self._inside("stat", "--file-system", "--format=%a %S", str(self.root)))
        blocks, size = map(int, out.split())
        return blocks * size

    def enforce_policies(self, kube_router: Path) -> None:
        """Enforce NetworkPolicies with kube-router's firewall in the node's network namespace."""
        options = [
            "--run-firewall=true",
            "--run-router=false",
            "--run-service-proxy=false",
            "--run-loadbalancer=false",
            f"--kubeconfig={self.directory / 'kubelet.kubeconfig'}",
            f"--hostname-override={self.name}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--health-port=0",
        ]
        command = self._inside(str(kube_router), *options)
        self._firewall = Server("kube-router", command, self.directory / "kube-router.log")
        self._firewall.start(lambda: "KUBE-ROUTER-FORWARD" in run(*self._inside("iptables", "-S"), check=False))

    # images

    def import_image(self, archive: Path) -> None:
        """Import an image without a registry."""
        self._archives.append(archive)
        self._import(archive)

    def _import(self, archive: Path) -> None:
        self.ctr("images", "import", "--snapshotter=native", str(archive))

    def ctr(self, *arguments: str, check: bool = True) -> str:
        """Run containerd's client in the namespace of Kubernetes."""
        return run(*self._inside("ctr", f"--address={SOCKET}", "--namespace=k8s.io", *arguments), check=check)

    # setup

    def _boot(self) -> None:
        cgroups.remove(self.name)
        cgroups.make(self.name)
        KUBELET_HOME.mkdir(exist_ok=True)
        self._holder.start(self._holds, timeout=30)
        command = self._inside("containerd", f"--config={self._containerd_config()}")
        self._containerd = Server("containerd", command, self.directory / "containerd.log")
        self._containerd.start(lambda: "Server:" in self.ctr("version", check=False), timeout=60)

    def _holds(self) -> bool:
        """Whether the first process has mounted the disk."""
        return any(Path(f"/proc/{pid}/root{self.root}/up").exists() for pid in _children(self._holder))

    def _holder_command(self) -> list[str]:
        script = _FIRST_PROCESS.format(home=KUBELET_HOME, disk=self._disk, root=self.root)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        return ["nsenter", f"--net={self.network.path}", *unshare, "sh", "-c", script]

    def _inside(self, *command: str) -> list[str]:
        """Return the command to run in the node's namespaces."""
        (first,) = _children(self._holder)
        return ["nsenter", f"--target={first}", "--mount", "--pid", "--net", *command]

    def _ready(self) -> bool:
        done = self.access.kubectl("get", "node", self.name, "-o", "json", check=False)
        if done.returncode:
            return False
        conditions = json.loads(done.stdout)["status"].get("conditions", [])
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    def _configure_network(self) -> None:
        for name in ("bridge", "loopback", "host-local"):
            target = self.directory / "cni-bin" / name
            target.unlink(missing_ok=True)
            target.symlink_to(self.binaries[name])
        addresses = {
            "type": "host-local",
            "dataDir": f"{self.root}/cni-addresses",
            "ranges": [[self.network.pods()]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        plugin = {"type": "bridge", "bridge": POD_BRIDGE, "ipam": addresses}
        network = {"cniVersion": "1.0.0", "name": "finetune", "plugins": [plugin]}
        (self.directory / "cni-conf" / "10-finetune.conflist").write_text(json.dumps(network))

    def _containerd_config(self) -> Path:
        return self.directory / "containerd.toml"

    def _kubelet_config(self) -> Path:
        return self.directory / "kubelet.yaml"

    def _kubelet_settings(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.network.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.client_ca)},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroups.PARENT}/{self.name}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": ["pods"],
            "containerRuntimeEndpoint": f"unix://{SOCKET}",
            "resolvConf": "/dev/null",
            "clusterDNS": [GATEWAY],
            "clusterDomain": CLUSTER_DOMAIN,
            "podLogsDir": f"{self.root}/pods-log",
            "volumePluginDir": f"{self.root}/volume-plugins",
            "containerLogMaxSize": "10Mi",
            "evictionHard": {"nodefs.available": "3%", "imagefs.available": "3%", "memory.available": "100Mi"},
            "evictionPressureTransitionPeriod": "10s",
            "healthzPort": 0,
            "readOnlyPort": 0,
        }

    def _kubelet_command(self) -> list[str]:
        return [
            str(self.binaries["kubelet"]),
            f"--config={self._kubelet_config()}",
            f"--kubeconfig={self.access.kubeconfig(self.directory / 'kubelet.kubeconfig')}",
            f"--root-dir={self.root / 'kubelet'}",
            f"--cert-dir={self.root / 'kubelet-certs'}",
            f"--hostname-override={self.name}",
            f"--node-ip={self.network.address}",
        ]


_CONTAINERD = """version = 2
root = "{root}/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{here}/cni-bin"
    conf_dir = "{here}/cni-conf"
"""


def _children(server: Server) -> list[int]:
    """Return the process ids of a running server's children."""
    try:
        return [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(server: Server | None) -> None:
    """Send SIGKILL to the children of `nsenter` or `unshare`, and then to these."""
    if server is not None and server.running:
        for pid in _children(server):
            os.kill(pid, signal.SIGKILL)
        server.kill()
