"""The client of OpenAI-compatible servers, tested with a real one that fails, stalls, rejects and resets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.synthesis.faulty_teacher import FAULTS, KEY, FaultyTeacher

from finetune_api.endpoint import Endpoint
from finetune_api.generation import Generation
from finetune_trainer.endpoint import client as client_module
from finetune_trainer.endpoint.chat import BadBody, ChatAnswer, ChatRequest, read_answer
from finetune_trainer.endpoint.client import ChatClient, NoAnswer, retry_after
from finetune_trainer.endpoint.cost import cost_of
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.endpoint.journaled_client import JournaledClient
from finetune_trainer.errors import UserError
from finetune_trainer.storage.filesystem import Storage


def echo(body: dict[str, Any]) -> str:
    return "you said " + str(body["messages"][-1]["content"])


def request(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": text},), **fields)


def endpoint(server: FaultyTeacher, **fields: Any) -> Endpoint:
    return Endpoint.model_validate({"baseUrl": server.url, "model": "teacher", **fields})


def asked(at: Endpoint, requests: list[ChatRequest], journal: Journal | None = None) -> list[Any]:
    """Return the answers or errors of requests that are sent at once."""

    async def all_of_them() -> list[Any]:
        async with ChatClient(at, "teacher.endpoint") as client:
            ask = client.complete if journal is None else JournaledClient(client, journal).ask
            return await asyncio.gather(*map(ask, requests), return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between retries, which these tests do not measure."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(client_module, "MAX_PAUSE", 0.05)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_request_is_answered_once_whatever_goes_wrong(seed: int, tmp_path: Path) -> None:
    journal = Journal(Storage(str(tmp_path)), "journal", tmp_path / "scratch")
    with FaultyTeacher(echo, faults=0.6, seed=seed, stall=60) as server:
        at = endpoint(server, timeoutSeconds=2, concurrency=8)
        started = time.monotonic()
        answers = asked(at, [request(f"{number}") for number in range(60)], journal)
        assert time.monotonic() - started < 50, "a stalled response was waited for"
        assert [answer.text for answer in answers] == [f"you said {number}" for number in range(60)]
        assert server.charged == 60 and not server.charged_twice
        assert set(server.fared) == {*FAULTS, "good"}
        # The server notices late that the client has given up a request.
        assert server.most_under_way <= 8 + server.fared["stall"] + server.fared["stall in the body"]


def test_a_journal_pays_for_nothing_twice(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with FaultyTeacher(echo, faults=0.3, seed=3, stall=60) as server:
        at = endpoint(server, timeoutSeconds=2)
        first = asked(at, [request(f"{number}") for number in range(20)], Journal(storage, "journal", tmp_path))
        torn = sorted((tmp_path / "journal").iterdir())[-1]
        torn.write_bytes(torn.read_bytes() + b'{"key": "half a li')
        again = Journal(storage, "journal", tmp_path)
        assert again.found == 20
        second = asked(at, [request(f"{number}") for number in range(25)], again)
        again.close()
        assert second[:20] == first
        assert server.charged == 25 and not server.charged_twice
    assert Journal(storage, "journal", tmp_path).found == 25


def test_the_same_request_at_once_is_sent_once(tmp_path: Path) -> None:
    journal = Journal(Storage(str(tmp_path)), "journal", tmp_path)
    with FaultyTeacher(echo, delay=0.05) as server:
        answers = asked(endpoint(server), [request("same")] * 10 + [request("same", sample=1)], journal)
        assert len({answer.text for answer in answers}) == 1
        assert server.charged == 2


def test_parts_roll_and_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.endpoint.journal.PART_BYTES", 200)
    storage = Storage(str(tmp_path))
    for attempt in range(2):
        journal = Journal(storage, "journal", tmp_path)
        assert journal.found == 10 * attempt
        for number in range(10):
            journal.record(f"{attempt}-{number}", ChatAnswer("ä\u2028" * number))
        journal.close()
    assert len(list((tmp_path / "journal").iterdir())) > 4
    found = Journal(storage, "journal", tmp_path).answers
    assert len(found) == 20 and found["1-9"].text == "ä\u2028" * 9


def test_a_remote_store_gets_the_parts_as_they_grow(tmp_path: Path) -> None:
    storage = Storage("memory://journal-test", skip_instance_cache=True)
    journal = Journal(storage, "journal", tmp_path / "here")
    journal.record("a", ChatAnswer("1"))
    journal.push()
    journal.record("b", ChatAnswer("2"))
    elsewhere = Journal(storage, "journal", tmp_path / "another machine")
    assert set(elsewhere.answers) == {"a"}, "what has been pushed"
    here = Journal(storage, "journal", tmp_path / "here")
    assert set(here.answers) == {"a", "b"}, "and on the same machine all"
    journal.close()
    assert storage.names("journal") == ["000-00000.jsonl"]
    assert set(Journal(storage, "journal", tmp_path / "a third").answers) == {"a", "b"}


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_no_request_gets_past_is_the_users(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with FaultyTeacher(echo) as server:
        _answer_with(server, lambda web: web.Response(status=status, text=f"the key {KEY} is wrong"))
        error = asked(endpoint(server, apiKeyEnv="TEACHER_KEY"), [request("x")])[0]
        assert isinstance(error, UserError)
        assert f"status {status}" in str(error) and KEY not in str(error)
        assert len(server.headers) == 1, "and it is not tried again"


def test_the_key_is_sent_and_its_absence_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyTeacher(echo) as server:
        at = endpoint(server, apiKeyEnv="TEACHER_KEY")
        with pytest.raises(UserError, match=r"teacher\.endpoint\.apiKeyEnv.*TEACHER_KEY.*is not set"):
            asked(at, [request("x")])
        monkeypatch.setenv("TEACHER_KEY", KEY)
        assert asked(at, [request("x")])[0].text == "you said x"
        assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"


def test_one_refused_request_is_no_fault_of_the_others() -> None:
    with FaultyTeacher(echo) as server:
        refuse = "prompt is too long"
        _answer_with(
            server,
            lambda web: web.Response(status=400, text=refuse),
            when=lambda body: "long" in body["messages"][0]["content"],
        )
        answers = asked(endpoint(server), [request("short"), request("long"), request("brief")])
        assert [type(answer) for answer in answers] == [ChatAnswer, NoAnswer, ChatAnswer]
        assert refuse in str(answers[1])


def test_what_a_server_does_not_know_is_left_out() -> None:
    generation = Generation.model_validate({"maxNewTokens": 7, "doSample": True, "topK": 5, "stop": ["###"]})

    def refusal(body: dict[str, Any]) -> str | None:
        if "max_tokens" in body:
            return "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return next((f"{name} is not supported" for name in ("response_format", "top_k") if name in body), None)

    with FaultyTeacher(echo) as server:
        _answer_with(
            server,
            lambda web: web.Response(status=400, text=str(refusal(server.bodies[-1]))),
            when=lambda body: refusal(body) is not None,
        )
        answer = asked(endpoint(server, concurrency=1), [request("x", generation=generation, structured=True)])[0]
        assert answer.text == "you said x"
        last = server.bodies[-1]
        assert last["max_completion_tokens"] == 7 and last["stop"] == ["###"] and last["temperature"] == 1.0
        assert len(server.bodies) == 4


def test_retries_come_to_an_end() -> None:
    with FaultyTeacher(echo, faults=1.0) as server:
        server.kinds = ("error 500",)
        error = asked(endpoint(server, maxRetries=3), [request("x")])[0]
        assert isinstance(error, NoAnswer) and "after 4 tries" in str(error) and KEY not in str(error)
        assert server.fared["error 500"] == 4


def test_a_server_that_never_answers_ends_the_run() -> None:
    async def wait_for(at: Endpoint) -> None:
        async with ChatClient(at, "teacher.endpoint", outage=0.3) as client:
            await client.complete(request("x"))

    at = Endpoint.model_validate({"baseUrl": "http://127.0.0.1:9/v1", "model": "m", "maxRetries": 1000})
    with pytest.raises(ConnectionError, match="has not answered for"):
        asyncio.run(wait_for(at))


def test_being_asked_to_wait_is_no_failure_and_holds_all() -> None:
    with FaultyTeacher(echo, faults=0.8, seed=5) as server:
        server.kinds = ("rate limit",)
        answers = asked(endpoint(server, maxRetries=0), [request(f"{number}") for number in range(10)])
        assert all(isinstance(answer, ChatAnswer) for answer in answers)
        assert server.fared["rate limit"] > 10


def test_requests_a_minute_are_spread() -> None:
    with FaultyTeacher(echo) as server:
        started = time.monotonic()
        asked(endpoint(server, requestsPerMinute=1200), [request(f"{number}") for number in range(11)])
        # 20 a second: the eleventh is sent half a second after the first; 0.1 s for a timer that rounds.
        assert time.monotonic() - started > 0.4


def test_answers_are_read_strictly() -> None:
    good = {"choices": [{"message": {"content": "a\ud800"}, "finish_reason": "length"}], "usage": {"prompt_tokens": 3}}
    answer = read_answer(json.dumps(good).encode())
    assert answer == ChatAnswer("a?", "length", "", 3, None)
    for bad in (b"", b"[]", b'{"choices": [{}]}', b'{"choices": [{"message": {"content": 5}}]}', b"[" * 100_000):
        with pytest.raises(BadBody):
            read_answer(bad)


def test_cost() -> None:
    at = Endpoint.model_validate({"baseUrl": "http://x/v1", "model": "m", "promptPrice": 2.0, "completionPrice": 10.0})
    answers = [ChatAnswer("", prompt_tokens=500_000, completion_tokens=100_000), ChatAnswer("")]
    cost = cost_of(answers, at)
    assert (cost.answers, cost.uncounted, cost.price) == (2, 1, 2.0)
    assert cost_of(answers, None).price is None


def test_retry_after() -> None:
    assert retry_after({}) is None and retry_after({"Retry-After": "soon"}) is None
    assert retry_after({"Retry-After": "1.5"}) == 1.5
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert (retry_after({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e9


def _answer_with(
    server: FaultyTeacher, response: Callable[[Any], Any], when: Callable[[dict[str, Any]], bool] = lambda body: True
) -> None:
    """Make the server return another response to the requests that `when` selects."""
    from aiohttp import web

    usual = server._good

    async def fare(incoming: Any, body: dict[str, Any]) -> Any:
        return response(web) if when(body) else await usual(incoming, body)

    server._good = fare  # type: ignore[method-assign]
