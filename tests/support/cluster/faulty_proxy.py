"""A reverse proxy in front of the API server that counts requests and injects faults by a rule.

It serves HTTPS with the API server's certificate, so a kubeconfig differs only in the address. Watches are streamed;
connection upgrades (exec, port-forward) are not supported.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter
from pathlib import Path

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web
from multidict import CIMultiDict
from support.cluster.api_calls import Call, Fault, Rule, read_call
from yarl import URL

HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "Host", "Content-Length", "Upgrade")
AUTO_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp's client would add to a request that lacks them."""
MAX_BODY = 16 * 1024 * 1024
REASONS = {
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}
START_SECONDS = 10


class FaultyProxy:
    """A context manager: a separate thread serves at `url` while it is entered.

    `rule` may be changed at any time; None forwards all requests. `cut_off` simulates a network partition between its
    clients and the API server, and `heal` ends it.
    """

    def __init__(self, upstream: str, ca_file: Path, key_file: Path, rule: Rule | None = None) -> None:
        self.rule = rule
        self.calls: list[Call] = []
        """All requests so far, in the order of their arrival."""
        self.faults: list[tuple[Call, Fault]] = []
        """The requests with an injected fault."""
        self.url = ""
        self._upstream = URL(upstream)
        self._ca_file, self._key_file = ca_file, key_file
        self._writes = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self.held: list[Call] = []
        """Requests that arrived during the partition."""
        self.late: list[tuple[Call, int]] = []
        """Held requests that `heal` has forwarded, with the API server's status codes."""
        self._connected = asyncio.Event()
        self._connected.set()
        self._tasks: set[asyncio.Task[web.StreamResponse]] = set()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        assert self._ready.wait(START_SECONDS), "the proxy did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def cut_off(self) -> None:
        """Hold back all requests and all events of open watches."""
        self._loop.call_soon_threadsafe(self._connected.clear)

    def heal(self) -> None:
        """Forward the held requests, also those of clients that have gone, as late packets arrive."""
        self._loop.call_soon_threadsafe(self._connected.set)

    def counts(self) -> Counter[tuple[str, str, str]]:
        """Return the number of requests by (user agent, verb, resource)."""
        return Counter((call.agent, call.verb, call.resource) for call in list(self.calls))

    def reset(self) -> None:
        """Forget all requests; the numbers start from 1 again."""
        self.calls, self.faults, self._writes = [], [], 0

    async def _serve(self) -> None:
        trusted = ssl.create_default_context(cafile=str(self._ca_file))
        own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.load_cert_chain(self._ca_file, self._key_file)
        connector = TCPConnector(limit=0, ssl=trusted)
        application = web.Application(client_max_size=MAX_BODY)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=own, backlog=1024)
        await site.start()
        self.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        async with ClientSession(
            connector=connector, timeout=ClientTimeout(), auto_decompress=False, skip_auto_headers=AUTO_HEADERS
        ) as self._session:
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = self._note(request)
        if not self._connected.is_set():
            self.held.append(call)
            task = asyncio.create_task(self._pass_on_late(call, request, await request.read()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return await asyncio.shield(task)
        fault = self.rule(call) if self.rule else None
        if fault is None:
            return await self._forward(request)
        self.faults.append((call, fault))
        if fault.kind == "lose":
            await self._forward(request, chunks=0)
        if fault.then is not None:
            fault.then()
        if fault.kind in ("drop", "lose"):
            return _broken(request)
        if fault.kind == "answer":
            return _refusal(call, fault.status)
        if fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
            return await self._forward(request)
        return await self._forward(request, chunks=fault.chunks)

    def _note(self, request: web.Request) -> Call:
        agent = request.headers.get("User-Agent", "")
        call = read_call(len(self.calls) + 1, self._writes, request.method, request.path, request.query, agent)
        self._writes += call.is_write
        self.calls.append(call)
        return call

    async def _pass_on_late(self, call: Call, request: web.Request, body: bytes) -> web.StreamResponse:
        await self._connected.wait()
        if call.verb == "watch":
            return _broken(request)
        target = self._upstream.join(URL(request.raw_path, encoded=True))
        headers = _end_to_end(request.headers)
        async with self._session.request(request.method, target, headers=headers, data=body or None) as answer:
            self.late.append((call, answer.status))
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def _forward(self, request: web.Request, chunks: int = -1) -> web.StreamResponse:
        """Forward a request and its answer; with `chunks`, only that many chunks of the answer's body."""
        target = self._upstream.join(URL(request.raw_path, encoded=True))
        body = await request.read()
        headers = _end_to_end(request.headers)
        async with self._session.request(
            request.method, target, headers=headers, data=body or None, allow_redirects=False
        ) as answer:
            if chunks == 0:
                await answer.read()
                return _broken(request)
            response = web.StreamResponse(status=answer.status, headers=_end_to_end(answer.headers))
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await self._connected.wait()
                await response.write(chunk)
                chunks -= 1
                if chunks == 0:
                    return _broken(request)
            await response.write_eof()
            return response


def _end_to_end(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Return the end-to-end headers, which a proxy forwards."""
    kept = CIMultiDict(headers)
    for name in HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def _broken(request: web.Request) -> web.Response:
    """Break the client's connection; the returned response is never sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _refusal(call: Call, code: int) -> web.Response:
    """Return the API server's error response; a watch receives "too old" as an event in a response with status 200."""
    status = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": f"injected fault: {code}",
        "reason": REASONS.get(code, "Unknown"),
        "code": code,
    }
    if call.verb == "watch" and code == 410:
        return web.Response(
            text=json.dumps({"type": "ERROR", "object": status}) + "\n", content_type="application/json"
        )
    headers = {"Retry-After": "1"} if code == 429 else None
    return web.json_response(status, status=code, headers=headers)
