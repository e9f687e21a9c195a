"""A Kubernetes control plane on loopback: etcd, kube-apiserver with RBAC, and the controllers that jobs need.

There is no scheduler and no kubelet: Jobs create pods, owned objects are deleted and TTLs expire, but a pod changes
only when a test changes it (`kubelet_stand_in`). `tests/e2e` adds both.
"""

from __future__ import annotations

import base64
import secrets
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from support.cluster.access import Access, Json
from support.cluster.kube_assets import CONTROL_PLANE, assets
from support.cluster.servers import Server, accepts, free_port

CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "deployment-controller",
    "disruption-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "ttl-after-finished-controller",
)
ISSUER = "https://kubernetes.default.svc"
SERVICE_RANGE = "10.96.0.0/16"
WATCH_GRACE = 3.0
"""Seconds for the API server to end open requests; it would wait a minute for open watches."""


class ControlPlane:
    """etcd, kube-apiserver and kube-controller-manager, which write all their files to `directory`.

    A context manager: entering starts them and waits until they are ready, leaving stops them.
    """

    def __init__(
        self,
        directory: Path,
        apiserver_options: Sequence[str] = (),
        controllers: Sequence[str] = (),
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        service_range: str = SERVICE_RANGE,
        definitions: Sequence[Json] = (),
    ) -> None:
        """Add `apiserver_options` to the API server's options (an audit log, say), `controllers` to `CONTROLLERS`.

        Args:
            address: of the API server.
            port: of the API server; 0 selects a free port.
            definitions: CRDs that exist before the controllers start. The garbage collector looks for new
                kinds only every 30 s, and until then does not delete the objects that they own.

        Raises:
            MissingAsset: the binaries are neither given nor can they be built.
        """
        binaries = assets(CONTROL_PLANE)
        self._controllers, self._definitions = (*CONTROLLERS, *controllers), definitions
        self.directory = directory
        self.kubectl = binaries["kubectl"]
        self.start_seconds = 0.0
        """Duration of the last start until all servers were ready."""
        self._etcd_port, self._etcd_peer_port, self._port, self._manager_port = (free_port() for _ in range(4))
        self._port = port or self._port
        self._address, self._service_range = address, service_range
        self.url = f"https://{address}:{self._port}"
        self.ca_file = directory / "certs" / "apiserver.crt"
        """The API server's certificate with its CA."""
        self.key_file = directory / "certs" / "apiserver.key"
        """The API server's private key, with which a proxy can serve the same certificate."""
        self._sa_key = directory / "service-accounts.key"
        self.admin = Access(self.url, self.ca_file, self._prepare(), self.kubectl)
        kubeconfig = self.admin.kubeconfig(directory / "admin.kubeconfig")
        self._etcd = Server("etcd", [str(binaries["etcd"]), *self._etcd_options()], directory / "etcd.log")
        self._apiserver = Server(
            "kube-apiserver",
            [str(binaries["kube-apiserver"]), *self._apiserver_options(), *apiserver_options],
            directory / "apiserver.log",
        )
        self._manager = Server(
            "kube-controller-manager",
            [str(binaries["kube-controller-manager"]), *self._manager_options(kubeconfig)],
            directory / "controller-manager.log",
        )

    def __enter__(self) -> ControlPlane:
        start = time.monotonic()
        try:
            self._etcd.start(lambda: accepts(self._etcd_port))
            self.start_apiserver()
            if self._definitions:
                self.admin.define(*self._definitions)
            self.start_controllers()
        except BaseException:
            self.__exit__()
            raise
        self.start_seconds = time.monotonic() - start
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self._manager, self._apiserver, self._etcd):
            server.stop(grace=WATCH_GRACE)

    def start_apiserver(self) -> None:
        """Start the API server at its address and wait until it is ready."""
        self._apiserver.start(lambda: self._healthy(f"{self.url}/readyz"))

    def stop_apiserver(self, *, kill: bool = False) -> None:
        """Stop the API server: every watch is cut, and connections are refused."""
        if kill:
            self._apiserver.kill()
        else:
            self._apiserver.stop(grace=WATCH_GRACE)

    def restart_apiserver(self, *, kill: bool = False, controllers: bool = True) -> None:
        """Restart the API server at the same address with the same data; open watches are cut.

        Args:
            controllers: whether to restart them as well. Otherwise they reconnect with backoff, after up to a minute
                where several outages follow each other.
        """
        self.stop_apiserver(kill=kill)
        if controllers:
            self.stop_controllers()
        self.start_apiserver()
        if controllers:
            self.start_controllers()

    def start_controllers(self) -> None:
        """Start kube-controller-manager and wait until its controllers run."""
        self._manager.start(lambda: self._healthy(f"https://127.0.0.1:{self._manager_port}/healthz", verify=False))

    def stop_controllers(self) -> None:
        """Stop the controllers: until `start_controllers`, no Job creates pods and no garbage is collected."""
        self._manager.stop()

    def apiserver_pid(self) -> int:
        """Process id of the API server, for measurements."""
        return self._apiserver.pid

    def _prepare(self) -> str:
        """Write the keys that the servers read, and return the administrator's token."""
        self._sa_key.write_text(_ec_private_key())
        token = secrets.token_urlsafe(24)
        (self.directory / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        return token

    def _healthy(self, url: str, *, verify: bool = True) -> bool:
        if not self.ca_file.exists():
            return False
        context = ssl.create_default_context(cafile=str(self.ca_file)) if verify else ssl._create_unverified_context()
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.admin.token}"} if verify else {})
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _etcd_options(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._etcd_peer_port}"
        return [
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def _apiserver_options(self) -> list[str]:
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--cert-dir={self.directory / 'certs'}",
            f"--bind-address={self._address}",
            f"--advertise-address={self._address}",
            f"--secure-port={self._port}",
            "--endpoint-reconciler-type=none",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self.directory / 'tokens.csv'}",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={self._sa_key}",
            f"--service-account-signing-key-file={self._sa_key}",
            f"--service-cluster-ip-range={self._service_range}",
            "--allow-privileged=true",
            "--profiling=false",
        ]

    def _manager_options(self, kubeconfig: Path) -> list[str]:
        """Return the options, without client rate limits so that tests of many jobs measure only the operator."""
        return [
            f"--kubeconfig={kubeconfig}",
            f"--controllers={','.join(self._controllers)}",
            f"--service-account-private-key-file={self._sa_key}",
            f"--root-ca-file={self.ca_file}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._manager_port}",
            f"--cert-dir={self.directory / 'manager-certs'}",
            "--kube-api-qps=1000",
            "--kube-api-burst=2000",
            "--concurrent-job-syncs=20",
        ]


def _ec_private_key() -> str:
    """Return a P-256 private key as PEM (SEC 1, RFC 5915, without the public key), which needs no library."""
    curve = bytes.fromhex("a00a06082a8648ce3d030107")
    body = bytes.fromhex("020101") + b"\x04\x20" + (secrets.randbits(255) or 1).to_bytes(32, "big") + curve
    encoded = base64.encodebytes(b"\x30" + bytes([len(body)]) + body).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{encoded}-----END EC PRIVATE KEY-----\n"
