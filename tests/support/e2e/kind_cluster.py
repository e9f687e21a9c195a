"""The cluster of the end-to-end tests with kind, on a machine with Docker: `FINETUNE_E2E=kind make e2e`.

Its images are those of `images/Dockerfile`, so its jobs need no files of this machine.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import yaml
from support.cluster.access import Access
from support.e2e.images import OPERATOR_IMAGE, ROOT, TRAINER_IMAGE
from support.e2e.network import run

NAME = "finetune-e2e"
SECONDS = 1800
"""Time limit of commands that build or pull images."""


def kind_missing() -> str:
    """Return why kind cannot run here, or an empty text."""
    absent = [name for name in ("docker", "kind", "kubectl") if shutil.which(name) is None]
    return f"no {', '.join(absent)} here" if absent else ""


class KindNode:
    """A worker node: a Docker container in which systemd runs the kubelet."""

    def __init__(self, container: str) -> None:
        self.name = self.container = container

    def start_kubelet(self) -> None:
        self._run("systemctl", "start", "kubelet")

    def stop_kubelet(self) -> None:
        self._run("systemctl", "kill", "--signal=KILL", "kubelet")
        self._run("systemctl", "stop", "kubelet")

    def lose(self) -> None:
        run("docker", "kill", self.container)

    def bring_back(self) -> None:
        run("docker", "start", self.container)

    def _run(self, *command: str) -> None:
        run("docker", "exec", self.container, *command)


class KindCluster:
    """A context manager like `OneMachine`: a control plane and two workers."""

    operator_image, trainer_image = OPERATOR_IMAGE, TRAINER_IMAGE
    pod_template: ClassVar[dict[str, object]] = {}

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.nodes = [KindNode(f"{NAME}-worker"), KindNode(f"{NAME}-worker2")]
        self.gateway = ""
        self.admin: Access

    def __enter__(self) -> KindCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        run("kind", "delete", "cluster", f"--name={NAME}")

    def restart_apiserver(self) -> None:
        """Stop the API server's container; the kubelet of the control plane starts it again."""
        run("docker", "exec", f"{NAME}-control-plane", "pkill", "-KILL", "kube-apiserver")

    def tag_image(self, image: str, name: str) -> None:
        """Add a name to an image."""
        run("docker", "tag", image, name)
        run("kind", "load", "docker-image", name, f"--name={NAME}", seconds=SECONDS)

    def import_image(self, archive: Path) -> None:
        run("kind", "load", "image-archive", str(archive), f"--name={NAME}", seconds=SECONDS)

    def _start(self) -> None:
        config = self.directory / "kind.yaml"
        roles = [{"role": role} for role in ("control-plane", "worker", "worker")]
        config.write_text(yaml.safe_dump({"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": roles}))
        kubeconfig = self.directory / "kind.kubeconfig"
        options = [f"--name={NAME}", f"--config={config}", f"--kubeconfig={kubeconfig}", "--wait=180s"]
        run("kind", "create", "cluster", *options, seconds=SECONDS)
        self.gateway = _gateway()
        self.admin = _administrator(kubeconfig, self.directory)
        for target, image in (("operator", self.operator_image), ("trainer", self.trainer_image)):
            build = ["--file", str(ROOT / "images" / "Dockerfile"), "--target", target, "--tag", image, str(ROOT)]
            run("docker", "build", *build, seconds=SECONDS)
            run("kind", "load", "docker-image", image, f"--name={NAME}", seconds=SECONDS)


def _gateway() -> str:
    """Return the address of this machine for kind's containers: the IPv4 gateway of their network."""
    pools = json.loads(run("docker", "network", "inspect", "kind"))[0]["IPAM"]["Config"]
    return next(pool["Gateway"] for pool in pools if "." in pool.get("Gateway", ""))


def _administrator(kubeconfig: Path, directory: Path) -> Access:
    """Return a cluster-admin account of the tests, with a token."""
    kubectl = shutil.which("kubectl") or "kubectl"
    with_config = [kubectl, f"--kubeconfig={kubeconfig}"]
    run(*with_config, "create", "serviceaccount", "admin", "--namespace=kube-system")
    binding = ["--clusterrole=cluster-admin", "--serviceaccount=kube-system:admin"]
    run(*with_config, "create", "clusterrolebinding", "finetune-e2e-admin", *binding)
    token = run(*with_config, "create", "token", "admin", "--namespace=kube-system", "--duration=8h").strip()
    cluster = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = directory / "kind.crt"
    authority.write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
    os.chmod(authority, 0o600)
    return Access(cluster["server"], authority, token, Path(kubectl))
