"""Binaries of the cluster tests, from `KUBEBUILDER_ASSETS` or built with Go from the modules in `assets/`.

Builds are kept outside the repository, in a folder named by version and by a hash of all inputs, so that
a second run costs nothing. `python tests/support/cluster/kube_assets.py` builds them before the tests and prints the
duration: about 10 minutes on two cores the first time, which does not count towards the time limit of any test.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

MODULES = Path(__file__).parent / "assets"
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
WANTED = (*CONTROL_PLANE, "helm")
"""The binaries of `tests/cluster`."""
NODE_PARTS = ("kubelet", "kube-scheduler", "coredns", "bridge", "loopback", "host-local")
"""The additional binaries of `tests/e2e`."""
ON_PATH = ("kubectl",)
"""Clients that are taken from PATH before any build, because any recent version works."""
BUILD_SECONDS = 2400


class MissingAsset(Exception):
    """A binary is neither given nor can it be built here; the message names the remedy."""


def _kubernetes_flags(version: str) -> str:
    major, minor, _ = version.removeprefix("v").split(".")
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    return " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in values.items())


def _helm_flags(version: str) -> str:
    """Return the flags for Helm's version and for the Kubernetes version that `helm template` assumes."""
    major, minor, _ = KUBERNETES.version.removeprefix("v").split(".")
    values = {"internal/version.version": version, "internal/version.metadata": ""}
    for package in ("pkg/chartutil", "pkg/lint/rules"):
        values |= {f"{package}.k8sVersionMajor": major, f"{package}.k8sVersionMinor": minor}
    return " ".join(f"-X helm.sh/helm/v3/{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class GoModule:
    """A wrapper module that pins one upstream module and everything below it."""

    folder: str
    """Folder below `assets/` with `go.mod`, `go.sum`, and `tools.go`, or `main.go` of a program defined there."""
    upstream: str
    version_flags: Callable[[str], str]
    """Linker flags that set the binary's version."""
    packages: dict[str, str]
    """Package of each binary."""

    @property
    def path(self) -> Path:
        return MODULES / self.folder

    @property
    def version(self) -> str:
        """The pinned version, such as `v1.34.4`."""
        lines = (self.path / "go.mod").read_text().splitlines()
        return next(line.split()[-1] for line in lines if f"{self.upstream} v" in line and "=>" not in line)

    @property
    def linker_flags(self) -> str:
        return f"-s -w {self.version_flags(self.version)}".strip()

    @property
    def cache(self) -> Path:
        """Folder of its binaries, which depends on version, dependencies and flags."""
        files = (self.path / name for name in ("go.mod", "go.sum", "main.go"))
        parts = [file.read_bytes() for file in files if file.exists()]
        digest = hashlib.sha256(b"\0".join([*parts, self.linker_flags.encode()])).hexdigest()
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "finetune-operator" / "kube" / f"{self.folder}-{self.version}-{digest[:12]}"


KUBERNETES = GoModule(
    "kubernetes",
    "k8s.io/kubernetes",
    _kubernetes_flags,
    {
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet")
    },
)
ETCD = GoModule("etcd", "go.etcd.io/etcd/server/v3", lambda version: "", {"etcd": "go.etcd.io/etcd/server/v3"})
HELM = GoModule("helm", "helm.sh/helm/v3", _helm_flags, {"helm": "helm.sh/helm/v3/cmd/helm"})
_PLUGINS = "github.com/containernetworking/plugins"
CNI = GoModule(
    "cni",
    _PLUGINS,
    lambda version: "",
    {
        "bridge": f"{_PLUGINS}/plugins/main/bridge",
        "loopback": f"{_PLUGINS}/plugins/main/loopback",
        "host-local": f"{_PLUGINS}/plugins/ipam/host-local",
    },
)
COREDNS = GoModule(
    "coredns", "github.com/coredns/coredns", lambda version: "", {"coredns": "finetune.dev/assets/coredns"}
)
_KUBE_ROUTER = "github.com/cloudnativelabs/kube-router/v2"
KUBE_ROUTER = GoModule(
    "kube-router", _KUBE_ROUTER, lambda version: "", {"kube-router": f"{_KUBE_ROUTER}/cmd/kube-router"}
)
"""The firewall that enforces NetworkPolicies."""
_FAKE_GCS = "github.com/fsouza/fake-gcs-server"
FAKE_GCS = GoModule("fake-gcs", _FAKE_GCS, lambda version: "", {"fake-gcs-server": _FAKE_GCS})
"""A server with Google Cloud Storage's API."""
ALL_MODULES = (ETCD, KUBERNETES, HELM, CNI, COREDNS, KUBE_ROUTER, FAKE_GCS)
SOURCES = {name: module for module in ALL_MODULES for name in module.packages}


def assets(names: Iterable[str] = CONTROL_PLANE) -> dict[str, Path]:
    """Return the path of each binary: given, on PATH, kept from an earlier build, or built now.

    Raises:
        MissingAsset: one of them is not given, and there is no Go to build it with.
        subprocess.CalledProcessError: a build failed; the output of the compiler is on stderr.
    """
    found = {name: _given(name) for name in names}
    for module in ALL_MODULES:
        missing = [name for name, path in found.items() if path is None and SOURCES[name] is module]
        found |= _built(module, missing)
    return {name: path for name, path in found.items() if path is not None}


def _given(name: str) -> Path | None:
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    on_path = shutil.which(name) if name in ON_PATH else None
    return Path(on_path) if on_path else None


def _built(module: GoModule, names: list[str]) -> dict[str, Path]:
    """Return the module's binaries after building those that its cache lacks; one process builds at a time."""
    paths = {name: module.cache / name for name in names}
    if all(path.is_file() for path in paths.values()):
        return paths
    module.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(module.cache / ".lock"):
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            _build(module, missing)
    return paths


def _build(module: GoModule, names: list[str]) -> None:
    if shutil.which("go") is None:
        raise MissingAsset(
            f"no {', '.join(names)} here: set KUBEBUILDER_ASSETS to a folder that has them, or install Go to build them"
        )
    packages = [module.packages[name] for name in names]
    with tempfile.TemporaryDirectory(dir=module.cache) as folder:
        flags = ["-trimpath", "-buildvcs=false", "-mod=readonly", "-ldflags", module.linker_flags]
        command = ["go", "build", *flags, "-o", f"{folder}/", *packages]
        subprocess.run(command, cwd=module.path, check=True, timeout=BUILD_SECONDS, stdout=sys.stderr)
        for name, package in zip(names, packages, strict=True):
            os.replace(Path(folder) / _output_name(package), module.cache / name)


def _output_name(package: str) -> str:
    """Return the name of the binary of `go build`: the last part of the path that is no major version."""
    *_, parent, last = package.split("/")
    return parent if last[:1] == "v" and last[1:].isdecimal() else last


def main(names: list[str]) -> None:
    """Prepare the binaries and print their paths, or print why this machine cannot have them."""
    start = time.monotonic()
    nodes = os.geteuid() == 0 and shutil.which("containerd") is not None
    wanted = (*WANTED, *NODE_PARTS) if nodes else WANTED
    try:
        for name, path in assets(names or wanted).items():
            print(f"{name}: {path}")
    except MissingAsset as missing:
        print(f"tests/cluster will be skipped: {missing}")
    print(f"cluster test binaries: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
