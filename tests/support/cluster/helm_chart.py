"""The operator's Helm chart, rendered and installed with the real helm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.cluster.access import Access, namespace_of
from support.cluster.kube_assets import assets

Json = dict[str, Any]
CHART = Path(__file__).parents[3] / "charts" / "finetune-operator"
RELEASE = "finetune-operator"


class HelmError(Exception):
    """Helm failed; the message is its output."""


def helm(*arguments: str, directory: Path, kubeconfig: Path | None = None) -> str:
    """Run helm with all its files below `directory`, and return its output.

    Raises:
        HelmError: it failed.
        MissingAsset: there is no helm, and no Go to build it with.
    """
    folders = {f"HELM_{kind}_HOME": str(directory / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    environment = {**os.environ, **folders, "KUBECONFIG": str(kubeconfig or "/dev/null")}
    command = [str(assets(["helm"])["helm"]), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def render(directory: Path, values: Json | None = None, *options: str, namespace: str = "finetune") -> list[Json]:
    """Render the chart's manifests with other values."""
    arguments = ["template", RELEASE, str(CHART), f"--namespace={namespace}", *_values(directory, values), *options]
    return [item for item in yaml.safe_load_all(helm(*arguments, directory=directory)) if item]


def _values(directory: Path, values: Json | None) -> list[str]:
    if not values:
        return []
    file = directory / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    return [f"--values={file}"]


def only(manifests: list[Json], kind: str, name: str = "") -> Json:
    """Return the only manifest of that kind whose name ends in `name`."""
    (found,) = (item for item in manifests if item["kind"] == kind and item["metadata"]["name"].endswith(name))
    return found


def environment(manifests: list[Json], namespace: str) -> dict[str, str]:
    """Return the environment variables of the operator's pod."""
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {item["name"]: item.get("value", namespace) for item in container["env"]}


@dataclass(frozen=True)
class Installed:
    """A release of the chart on the API server."""

    namespace: str
    access: Access
    """The access of the operator's pod, by a token of its service account."""
    environment: dict[str, str]
    """The variables of the operator's container."""
    manifests: list[Json]
    admin: Access
    directory: Path

    def helm(self, *arguments: str) -> str:
        """Run helm as the administrator in the release's namespace."""
        kubeconfig = self.admin.kubeconfig(self.directory / "admin.kubeconfig", self.namespace)
        return helm(*arguments, f"--namespace={self.namespace}", directory=self.directory, kubeconfig=kubeconfig)


@contextmanager
def installed(admin: Access, directory: Path, values: Json | None = None, *options: str) -> Iterator[Installed]:
    """Install the chart into a new namespace; delete the release and its namespace at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with namespace_of(admin, "finetune-system") as namespace:
        manifests = render(directory, values, *options, namespace=namespace)
        account = only(manifests, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"]
        bare = Installed(namespace, admin, environment(manifests, namespace), manifests, admin, directory)
        bare.helm("install", RELEASE, str(CHART), *_values(directory, values), *options)
        try:
            access = admin.service_account(namespace, account)
            yield Installed(namespace, access, bare.environment, manifests, admin, directory)
        finally:
            bare.helm("uninstall", RELEASE, "--ignore-not-found")
