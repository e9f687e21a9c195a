"""One Kubernetes node on this machine: containerd, runc, CNI bridge and kubelet, each a process of the tests' own.

It needs root, cgroup v1 or v2, and `apt-get install containerd runc iptables`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import yaml
from access import Access
from servers import Server

NEEDED = ("containerd", "ctr", "runc", "iptables", "ip")
NODE = "node-1"
BRIDGE, GATEWAY, POD_RANGE = "finetune-e2e0", "10.88.77.1", "10.88.77.0/24"
PAUSE_IMAGE = "finetune.test/pause:1"
CLUSTER_DOMAIN = "cluster.local"


def missing() -> str:
    """Why there can be no node here; empty where there can."""
    if os.geteuid() != 0:
        return "a node needs root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"no {', '.join(absent)} here: apt-get install containerd runc iptables iproute2" if absent else ""


class Node:
    """A context manager: entering starts containerd and the kubelet, leaving stops both and every pod's sandbox.

    Args:
        binaries: paths of `kubelet`, `bridge`, `loopback` and `host-local`.
    """

    def __init__(self, directory: Path, access: Access, binaries: dict[str, Path]) -> None:
        self.directory, self.access, self.binaries = directory, access, binaries
        self.socket = directory / "containerd.sock"
        for name in ("cni-bin", "cni-conf", "kubelet", "pods-log"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._containerd = Server("containerd", ["containerd", f"--config={self._containerd_config()}"],
                                  directory / "containerd.log")  # fmt: skip
        self._kubelet = Server("kubelet", self._kubelet_command(), directory / "kubelet.log")

    def __enter__(self) -> Node:
        self._network()
        self._containerd.start(lambda: self.ctr("version", check=False) == 0, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._kubelet.stop()
        self._remove_containers()
        self._containerd.stop()
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)

    def start_kubelet(self) -> None:
        self._kubelet.start(self._ready, timeout=90)

    def stop_kubelet(self) -> None:
        """The node's agent is away; its pods run on."""
        self._kubelet.kill()

    def ctr(self, *arguments: str, check: bool = True) -> int:
        """Run containerd's own client in the namespace of Kubernetes."""
        command = ["ctr", f"--address={self.socket}", "--namespace=k8s.io", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 or not check, f"{' '.join(arguments)}: {done.stderr}"
        return done.returncode

    def import_image(self, archive: Path) -> None:
        """Make an image known without a registry."""
        self.ctr("images", "import", "--snapshotter=native", str(archive))

    def _ready(self) -> bool:
        done = self.access.kubectl("get", "node", NODE, "-o", "json", check=False)
        if done.returncode:
            return False
        conditions = json.loads(done.stdout)["status"].get("conditions", [])
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    def _network(self) -> None:
        """Pods reach the host at the bridge's address; the kernel passes their packets on."""
        subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
        for command in (
            ["ip", "link", "add", BRIDGE, "type", "bridge"],
            ["ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE],
            ["ip", "link", "set", BRIDGE, "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)
        for name in ("bridge", "loopback", "host-local"):
            target = self.directory / "cni-bin" / name
            target.unlink(missing_ok=True)
            target.symlink_to(self.binaries[name])
        plugins = [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(self.directory / "cni-addresses"),
                    "ranges": [[{"subnet": POD_RANGE, "rangeStart": "10.88.77.10"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "loopback"},
        ]
        network = {"cniVersion": "1.0.0", "name": "finetune", "plugins": plugins[:1]}
        (self.directory / "cni-conf" / "10-finetune.conflist").write_text(json.dumps(network))

    def _containerd_config(self) -> Path:
        path = self.directory / "containerd.toml"
        path.write_text(f"""version = 2
root = "{self.directory}/containerd"
state = "{self.directory}/containerd-state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{self.directory}/cni-bin"
    conf_dir = "{self.directory}/cni-conf"
""")
        return path

    def _kubelet_command(self) -> list[str]:
        configuration = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": GATEWAY,  # of this machine alone, so that nobody else is let in by what follows
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "resolvConf": "/dev/null",
            "clusterDNS": [GATEWAY],
            "clusterDomain": CLUSTER_DOMAIN,
            "podLogsDir": str(self.directory / "pods-log"),
            "containerLogMaxSize": "10Mi",
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
            "healthzPort": 0,
            "readOnlyPort": 0,
            "syncFrequency": "10s",
            "serializeImagePulls": False,
        }
        path = self.directory / "kubelet.yaml"
        path.write_text(yaml.safe_dump(configuration))
        return [
            str(self.binaries["kubelet"]),
            f"--config={path}",
            f"--kubeconfig={self.access.kubeconfig(self.directory / 'kubelet.kubeconfig')}",
            f"--root-dir={self.directory / 'kubelet'}",
            f"--cert-dir={self.directory / 'kubelet-certs'}",
            f"--hostname-override={NODE}",
            f"--node-ip={GATEWAY}",
        ]

    def _remove_containers(self) -> None:
        command = ["ctr", f"--address={self.socket}", "--namespace=k8s.io", "tasks", "list", "-q"]
        for task in subprocess.run(command, capture_output=True, text=True).stdout.split():
            self.ctr("tasks", "kill", "--signal=SIGKILL", task, check=False)
