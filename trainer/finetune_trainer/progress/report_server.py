"""The HTTP server of an attempt's driver, for the operator: `GET /v1/report`, `POST /v1/stop`.

The standard library's server is enough for one client that polls every few seconds, and loads no further libraries.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from finetune_api.report import PORT, REPORT_PATH, STOP_PATH, AttemptReport


class ReportServer:
    """An HTTP server in a thread. A context manager.

    Args:
        report: returns the current report.
        stop: called when the operator asks the attempt to stop.
        token: bearer token that requests must have.
        address: host and port.

    Raises:
        OSError: the port is in use.
    """

    def __init__(
        self,
        report: Callable[[], AttemptReport],
        stop: Callable[[], None],
        token: str,
        address: tuple[str, int] = ("", PORT),
    ) -> None:
        self._server = ThreadingHTTPServer(address, _handler(report, stop, token))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)

    def __enter__(self) -> ReportServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(report: Callable[[], AttemptReport], stop: Callable[[], None], token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client has disconnected
                super().handle()

        def do_GET(self) -> None:
            if self._allowed(REPORT_PATH):
                self._respond(200, report().model_dump_json(by_alias=True, exclude_none=True))

        def do_POST(self) -> None:
            if self._allowed(STOP_PATH):
                stop()
                self._respond(202, "{}")

        def _allowed(self, path: str) -> bool:
            presented = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(presented, token.encode()):
                self._respond(401, "{}")
            elif self.path != path:
                self._respond(404, "{}")
            else:
                return True
            return False

        def _respond(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Do not log requests, because there is one every few seconds."""

    return Handler
