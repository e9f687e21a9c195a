"""KubeRay's own operator as a process of this machine, for what is tried by hand. No part of it is kept here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.cluster.servers import Server
from support.e2e.clusters import Cluster

RESOLV = "/etc/resolv.conf"


@contextmanager
def kuberay(cluster: Cluster, manager: Path, crds: Path) -> Iterator[None]:
    """Apply KubeRay's CRDs and run its operator.

    It looks for heads by the names of their Services, so it gets the cluster's DNS in a mount namespace of its own.

    Args:
        manager: the operator's program, such as `go build` makes it of KubeRay's `ray-operator`.
        crds: `ray-operator/config/crd/bases`.
    """
    cluster.admin.kubectl("apply", "--server-side", f"--filename={crds}")
    resolv, config = cluster.directory / "kuberay.resolv.conf", cluster.directory / "kuberay.kubeconfig"
    resolv.write_text(f"nameserver {cluster.gateway}\noptions ndots:5 timeout:2\n")
    program = [str(manager), "--enable-leader-election=false", "--metrics-addr=0", "--health-probe-bind-address=0"]
    inner = f"mount --bind {resolv} {RESOLV} && exec {' '.join(program)}"
    settings = f"KUBECONFIG={cluster.admin.kubeconfig(config)}"
    command = ["env", settings, "unshare", "--mount", "sh", "-c", inner]
    server = Server("kuberay", command, cluster.directory / "kuberay.log")
    server.start(lambda: True)
    try:
        yield
    finally:
        server.stop()
