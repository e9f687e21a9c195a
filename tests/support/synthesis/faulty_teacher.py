"""A local OpenAI-compatible server that fails at random, with a seed, and counts the answers that it charges for."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FAULTS = (
    "error 500",
    "error 503",
    "rate limit",
    "stall",
    "stall in the body",
    "reset",
    "cut body",
    "no JSON",
    "HTML",
    "no choices",
    "null",
)
KEY = "sk-this-key-must-never-be-seen-0123456789"


class FaultyTeacher:
    """A server that runs in a thread of its own, as a context manager.

    Args:
        answer: returns the text that answers a request's body.
        faults: the share of requests that fail, each with one of `FAULTS`.
        stall: seconds that a stalled response hangs.
    """

    def __init__(
        self, answer: Callable[[Json], str], faults: float = 0.0, seed: int = 0, stall: float = 60.0, delay: float = 0.0
    ) -> None:
        self.answer, self.faults, self.stall, self.delay = answer, faults, stall, delay
        self.random = random.Random(seed)
        self.kinds: tuple[str, ...] = FAULTS
        self.paid: Counter[str] = Counter()
        """How often each request body was answered completely with status 200, and so charged."""
        self.fared: Counter[str] = Counter()
        """Number of requests by outcome: `good`, or the fault."""
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = self.admitted = 0
        self.hold_after: int | None = None
        """After this many charged answers, requests wait until `release`."""
        self.held = threading.Event()
        """Set when a request waits."""
        self._released = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def charged(self) -> int:
        return sum(self.paid.values())

    @property
    def charged_twice(self) -> list[str]:
        return [body for body, count in self.paid.items() if count > 1]

    def release(self) -> None:
        self._released.set()

    def until_left(self, seconds: float = 60) -> None:
        """Wait until no request is in progress.

        The server notices late that a client was killed, and until then still answers it and charges for the answer.

        Raises:
            AssertionError: a request is still in progress after `seconds`.
        """
        assert self._idle.wait(seconds), f"{self.under_way} requests are still under way"

    def __enter__(self) -> FaultyTeacher:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        server = site._server
        assert isinstance(server, asyncio.Server)
        return int(server.sockets[0].getsockname()[1])

    async def _end(self) -> None:
        await self._runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "teacher"}, {"id": "other"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.under_way += 1
        self._idle.clear()
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._fare(request)
        finally:
            self.under_way -= 1
            if not self.under_way:
                self._idle.set()

    async def _fare(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        fault = self.random.choice(self.kinds) if self.random.random() < self.faults else "good"
        if self.delay:
            await asyncio.sleep(self.delay * self.random.random())
        self.fared[fault] += 1
        if fault == "good":
            while self.hold_after is not None and self.admitted >= self.hold_after and not self._released.is_set():
                self.held.set()
                await asyncio.sleep(0.005)
            self.admitted += 1
            return await self._good(request, body)
        return await self._bad(request, fault, body)

    async def _good(self, request: web.Request, body: Json) -> web.StreamResponse:
        content = json.dumps(self.completion(body)).encode()
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(content))})
        await response.prepare(request)
        # Count before sending: the client may have the response before the next line runs.
        self.paid[json.dumps(body, sort_keys=True)] += 1
        await response.write(content)
        await response.write_eof()
        return response

    def completion(self, body: Json) -> Json:
        """Return the complete response to a request's body."""
        text = self.answer(body)
        prompt = sum(len(message["content"].split()) for message in body["messages"])
        return {
            "model": "teacher-1",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": len(text.split())},
        }

    async def _bad(self, request: web.Request, fault: str, body: Json) -> web.StreamResponse:
        whole = json.dumps(self.completion(body))
        plain: dict[str, Callable[[], web.Response]] = {
            "error 500": lambda: web.Response(status=500, text=f"oops, your key is {KEY}"),
            "error 503": lambda: web.json_response({"error": {"message": "overloaded"}}, status=503),
            "rate limit": lambda: web.Response(status=429, headers={"Retry-After": "0.05"}, text="slow down"),
            "no JSON": lambda: web.Response(text=whole[: len(whole) // 2], content_type="application/json"),
            "HTML": lambda: web.Response(text="<html>Bad gateway</html>", content_type="text/html"),
            "no choices": lambda: web.json_response({"choices": []}),
            "null": lambda: web.json_response(None),
        }
        if fault in plain:
            return plain[fault]()
        if fault == "stall":
            await asyncio.sleep(self.stall)
            return web.Response(status=500)
        return await self._broken(request, fault, whole.encode())

    async def _broken(self, request: web.Request, fault: str, content: bytes) -> web.StreamResponse:
        """Return a response that ends or stalls in the middle."""
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(content))})
        if fault != "reset":
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
        if fault == "stall in the body":
            await asyncio.sleep(self.stall)
        if request.transport is not None:
            request.transport.abort()
        return response
