"""The operator as a separate process, as its container runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from support.cluster.access import Access
from support.cluster.servers import Server, ServerFailed, free_port

KEY = b"a key of the tests"
FAST = {
    "FINETUNE_POLL_SECONDS": "0.2",
    "FINETUNE_STATUS_SECONDS": "0.5",
    "FINETUNE_STATUS_WRITES_PER_SECOND": "100",
    "FINETUNE_BACKOFF_SECONDS": "1",
    "FINETUNE_IMAGE_PULL_SECONDS": "3",
    "FINETUNE_RAY_VERSION": "2.60.0",
    "FINETUNE_LEASE": "",  # its renewals would mix with the writes that tests count; `test_operator_lease` uses a Lease
}


class OperatorProcess:
    """A context manager: entering starts the operator, leaving stops it.

    Args:
        access: the operator's credentials and the API server's address (or a proxy's).
        settings: `FINETUNE_...` variables that override those for fast tests; this class sets ports and the token key.
        own_key: the operator finds or creates its token key itself.
        program: arguments of Python that run the operator.
    """

    def __init__(
        self,
        access: Access,
        directory: Path,
        *,
        own_key: bool = False,
        program: Sequence[str] = ("-m", "finetune_operator.main"),
        **settings: str,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        key_file = directory / "token-key"
        key_file.write_bytes(KEY)
        self._health, self._metrics = free_port(), free_port()
        self._environment = {
            **FAST,
            **settings,
            "KUBECONFIG": str(access.kubeconfig(directory / "kubeconfig")),
            "FINETUNE_TOKEN_KEY_FILE": "" if own_key else str(key_file),
            "FINETUNE_HEALTH_PORT": str(self._health),
            "FINETUNE_METRICS_PORT": str(self._metrics),
        }
        command = ["env", *(f"{name}={value}" for name, value in self._environment.items())]
        self._server = Server("operator", [*command, sys.executable, *program], directory / "log")

    def __enter__(self) -> OperatorProcess:
        self.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            print(f"the operator, which {'runs' if self._server.running else 'has ended'}:\n{self._server.log_tail()}")
        self._server.stop()

    @contextmanager
    def kept_up(self) -> Iterator[OperatorProcess]:
        """Run the operator, and restart it whenever it ends, as a kubelet does."""
        over = threading.Event()

        def keep() -> None:
            while not over.is_set():
                if self.wait_for_death(0.5):
                    with suppress(ServerFailed):  # it ended again before it was ready
                        self.start()

        keeper = threading.Thread(target=keep, daemon=True)
        with self:
            keeper.start()
            try:
                yield self
            finally:
                over.set()
                keeper.join()

    def start(self) -> None:
        self._server.start(self.healthy)

    def kill(self) -> None:
        """Kill the operator with SIGKILL."""
        self._server.kill()

    def wait_for_death(self, seconds: float) -> bool:
        """Whether the process ends within `seconds`."""
        process = self._server._process
        assert process is not None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def pid(self) -> int:
        return self._server.pid

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}/healthz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metrics(self) -> str:
        """Return the metrics that Prometheus would scrape."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def log(self) -> str:
        return self._server.log.read_text(errors="replace")

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """Return the CPU time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(check: object, timeout: float = 30, pause: float = 0.05) -> None:
    """Poll until `check()` is true, for conditions without a watch.

    Raises:
        AssertionError: it is not true in time.
    """
    assert callable(check)
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(pause)
