"""The part of a kubelet that serves logs to the API server."""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

WAIT_SECONDS = 20
"""Maximum seconds that a reader waits for a line."""


@dataclass
class PodLog:
    """The output of a container: time stamps (nine decimal places) and lines.

    A reader that follows waits for more lines until the log ends or is cut off.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)
    ended: bool = False
    cuts: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, *texts: str) -> None:
        with self.changed:
            for text in texts:
                second, nanosecond = divmod(len(self.lines), 2)
                self.lines.append((f"2026-11-24T03:00:{second:02d}.{nanosecond:09d}Z", text))
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def after(self, done: int, cuts: int) -> tuple[list[tuple[str, str]], bool]:
        """Return the lines after the first `done`, and whether the log has ended for this reader.

        Wait until there are such lines, or until the log has ended for a reader that saw `cuts` cuts.
        """
        with self.changed:
            self.changed.wait_for(lambda: len(self.lines) > done or self.ended or self.cuts > cuts, WAIT_SECONDS)
            return self.lines[done:], self.ended or self.cuts > cuts

    def cut(self) -> None:
        """Break the connection of every reader, as a kubelet does that restarts."""
        with self.changed:
            self.cuts += 1
            self.changed.notify_all()


class LogStandIn:
    """A context manager: while it is entered, it serves the logs of pods on `node` to the API server.

    Args:
        certificate: of the server, with its key; the API server does not verify certificates of kubelets.
    """

    def __init__(self, core: client.CoreV1Api, node: str, certificate: Path, key: Path) -> None:
        self.logs: dict[str, PodLog] = {}
        """Logs by the name of the pod."""
        self.queries: list[dict[str, str]] = []
        self._core, self._node = core, node
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> LogStandIn:
        endpoint = {"kubeletEndpoint": {"Port": self._server.server_port}}
        addresses = [{"type": "InternalIP", "address": "127.0.0.1"}]
        status = {"addresses": addresses, "daemonEndpoints": endpoint}
        self._core.patch_node_status(self._node, {"status": status})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for log in self.logs.values():
            log.end()
        self._server.shutdown()
        self._server.server_close()


def _handler(stand_in: LogStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Serve `/containerLogs/NAMESPACE/POD/CONTAINER`."""
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            stand_in.queries.append(query)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if self._sent(stand_in.logs[url.path.split("/")[3]], query):
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.close_connection = True

        def _sent(self, log: PodLog, query: dict[str, str]) -> bool:
            """Send the log and return whether it was sent to its end."""
            cuts, done = log.cuts, 0
            if "tailLines" in query:
                done = len(log.lines) - int(query["tailLines"])
            over = False
            while not over:
                news, over = log.after(done, cuts)
                done += len(news)
                for stamp, text in news:
                    if stamp[:19] >= query.get("sinceTime", "")[:19]:
                        self._chunk(f"{stamp} {text}\n" if query.get("timestamps") == "true" else f"{text}\n")
                over = over or query.get("follow") != "true"
            return log.cuts == cuts

        def _chunk(self, text: str) -> None:
            data = text.encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

        def log_message(self, *_: object) -> None:
            """Suppress the output of the HTTP server."""

    return Handler
