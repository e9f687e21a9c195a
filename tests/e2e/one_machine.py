"""A whole Kubernetes on this machine: the control plane of `tests/cluster`, a scheduler, a node, cluster DNS."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from access import Access
from control_plane import ControlPlane
from images import archive
from node import CLUSTER_DOMAIN, GATEWAY, PAUSE_IMAGE, Node
from servers import Server

ROOT = Path(__file__).parents[2]
TRAINER_IMAGE = "finetune.test/trainer:1"
APISERVER_OPTIONS = ("--kubelet-preferred-address-types=InternalIP",)
CONTROLLERS = ("node-lifecycle-controller", "taint-eviction-controller")


class OneMachine:
    """A context manager: entering brings all up, leaving takes all down.

    Args:
        binaries: paths of kube-scheduler, kubelet, coredns, pause and the CNI plugins.
    """

    def __init__(self, directory: Path, binaries: dict[str, Path]) -> None:
        self.directory, self._binaries, self._stack = directory, binaries, ExitStack()
        self.control_plane = ControlPlane(directory, APISERVER_OPTIONS, CONTROLLERS)
        self.admin: Access = self.control_plane.admin
        self.node = Node(directory / "node", self.admin, binaries)

    def __enter__(self) -> OneMachine:
        try:
            self._stack.enter_context(self.control_plane)
            kubeconfig = self.admin.kubeconfig(self.directory / "parts.kubeconfig")
            self._stack.enter_context(self.node)
            self._images()
            self._stack.enter_context(self._running("kube-scheduler", self._scheduler(kubeconfig)))
            self._stack.enter_context(self._running("coredns", self._dns(kubeconfig), self._dns_answers))
            self.node.start_kubelet()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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
        """Answers are kept for a second, so that a pod that looks too early soon finds what it looks for."""
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

    def _images(self) -> None:
        pause = {"/pause": self._binaries["pause"].read_bytes()}
        self.node.import_image(
            archive(self.directory / "pause.tar", PAUSE_IMAGE, {"Entrypoint": ["/pause"]}, files=pause)
        )
        self.node.import_image(trainer_image(self.directory / "trainer.tar"))


def host_paths() -> list[str]:
    """What the trainer's containers get of this machine, read-only: its libraries, this Python and its packages."""
    interpreter = Path(os.path.realpath(sys.executable)).parents[1]
    return ["/usr", str(interpreter), str(ROOT)]


def trainer_image(path: Path) -> Path:
    """A root without anything but mount points: what is not in it can't be relied on by chance."""
    places = [*host_paths(), "/tmp", "/cache", "/pvc", "/etc/finetune", "/etc/finetune-token", "/dev", "/proc", "/sys"]
    files = {
        "/etc/passwd": b"root:x:0:0::/root:/bin/sh\nfinetune:x:1000:1000::/tmp:/bin/sh\n",
        "/etc/group": b"root:x:0:\nfinetune:x:1000:\n",
        "/etc/ld.so.cache": Path("/etc/ld.so.cache").read_bytes(),
    }
    links = {f"/{name}": f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64") if Path(f"/{name}").is_symlink()}
    environment = [f"PATH={Path(sys.executable).parent}:/usr/bin:/bin", "LANG=C.UTF-8"]
    config = {"Env": environment, "User": "1000:1000", "WorkingDir": "/tmp"}
    return archive(path, TRAINER_IMAGE, config, directories=places, files=files, links=links)
