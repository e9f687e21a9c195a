"""A driver's report port that sends hostile answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_api.report import PORT, REPORT_PATH

STEP = {"step": 1, "total": 2}
HOSTILE_ANSWERS: dict[str, bytes] = {
    "huge": json.dumps({"step": STEP, "message": "x" * 2**20}).encode(),
    "malformed": b'{"step": {"step": 1',
    "deep": b"[" * 100_000,
    "not a number": b'{"step": {"step": 1, "total": 2, "loss": NaN}}',
    "too large a number": json.dumps({"step": {"step": 10**30, "total": 2}}).encode(),
    "wrong types": b'{"step": {"step": [], "total": {}}}',
    "unknown fields": b'{"step": {"step": 1, "total": 2}, "phase": "Succeeded"}',
    "other stages": json.dumps({"step": STEP, "stages": [{"name": "x", "state": "Running"}] * 32}).encode(),
    "half a character": b'{"step": {"step": 1, "total": 2}, "message": "\\ud800"}',
    "redirect": b"",
    "slow": json.dumps({"step": STEP}).encode(),
    "not found": json.dumps({"step": STEP}).encode(),
}


@dataclass
class HostilePort:
    """Counts of the requests to a hostile port."""

    asked: int = 0
    elsewhere: int = 0
    """Requests that followed a redirect."""


@contextmanager
def hostile_port(kind: str, ip: str) -> Iterator[HostilePort]:
    """Serve hostile answers of this kind at the report's port."""
    seen, over = HostilePort(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != REPORT_PATH:
                seen.elsewhere += 1
            seen.asked += 1
            self.send_response({"redirect": 307, "not found": 404}.get(kind, 200))
            if kind == "redirect":
                self.send_header("Location", f"http://{ip}:{PORT}/elsewhere")
            self.send_header("Content-Length", str(len(HOSTILE_ANSWERS[kind])))
            self.end_headers()
            self._say(HOSTILE_ANSWERS[kind])

        def _say(self, body: bytes) -> None:
            try:
                if kind != "slow":
                    self.wfile.write(body)
                    return
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    if over.wait(0.5):
                        return
            except OSError:
                return  # the operator closed the connection

        def log_message(self, *_: Any) -> None:
            pass

    ThreadingHTTPServer.allow_reuse_address = True
    server = ThreadingHTTPServer((ip, PORT), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
