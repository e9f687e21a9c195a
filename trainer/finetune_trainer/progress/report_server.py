"""The HTTP port at which an attempt's driver answers the operator: `GET /v1/report`, `POST /v1/stop`.

The standard library's server is enough for one client that asks every few seconds, and adds no dependency to a
driver's start.
"""

from __future__ import annotations

import contextlib
import hmac
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from finetune_api.report import PORT, REPORT_PATH, STOP_PATH, AttemptReport


class ReportServer:
    """Serves until closed. A context manager.

    Args:
        report: gives the newest report.
        stop: is called when the operator asks the attempt to stop.
        token: what a caller must show as a bearer token.

    Raises:
        OSError: the port is taken.
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
            with contextlib.suppress(ConnectionError):  # a caller that has gone wants no answer
                super().handle()

        def do_GET(self) -> None:
            if self._allowed(REPORT_PATH):
                self._answer(200, report().model_dump_json(by_alias=True, exclude_none=True))

        def do_POST(self) -> None:
            if self._allowed(STOP_PATH):
                stop()
                self._answer(202, "{}")

        def _allowed(self, path: str) -> bool:
            shown = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(shown, token.encode()):
                self._answer(401, "{}")
            elif self.path != path:
                self._answer(404, "{}")
            else:
                return True
            return False

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged: there is one every few seconds."""

    return Handler
