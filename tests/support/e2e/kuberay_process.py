"""KubeRay's operator as a process of this machine, for manual tests; KubeRay itself is not included."""

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

    It finds heads by the names of their Services, so it uses the cluster's DNS in a separate mount namespace.

    Args:
        manager: the operator's program, the output of `go build` in KubeRay's `ray-operator`.
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
