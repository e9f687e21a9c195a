"""Requests to the API server, and the faults to inject into them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}
_OF_NAMESPACES = ("status", "finalize")


@dataclass(frozen=True)
class Call:
    """One request, described as in RBAC rules."""

    number: int
    """Position among all requests of this proxy, from 1."""
    write_number: int
    """Position among its writes, from 1; 0 for a read."""
    agent: str
    """The client's User-Agent."""
    verb: str
    """get, list, watch, create, update, patch, delete or deletecollection; for no resource, the HTTP method."""
    resource: str
    """Plural with its subresource, such as `pods` or `finetunejobs/status`; for no resource, the path."""
    namespace: str
    name: str

    @property
    def is_write(self) -> bool:
        return self.verb in WRITES


@dataclass(frozen=True)
class Fault:
    """A fault of a request.

    `answer`: the proxy answers `status` itself, and the API server receives nothing. `drop`: the API server receives
    nothing, and the connection breaks. `lose`: the API server handles the request, and the connection breaks before its
    answer. `delay`: the request waits `seconds`. `cut`: the answer breaks off after `chunks` chunks (of a watch, one or
    more events each).
    """

    kind: Literal["answer", "drop", "lose", "delay", "cut"]
    status: int = 500
    seconds: float = 0.1
    chunks: int = 1
    then: Callable[[], None] | None = None
    """Called when the fault is injected, for `lose` after the API server's answer; for example to kill the client."""


Rule = Callable[[Call], Fault | None]
Choice = Callable[[Call], bool]


def anything(_: Call) -> bool:
    """Select every request."""
    return True


def schedule(seed: int, rate: float, faults: Iterable[Fault], where: Choice = anything) -> Rule:
    """Return a rule that injects one of `faults` into a share `rate` of the requests that `where` selects."""
    chance, choices = random.Random(seed), list(faults)

    def rule(call: Call) -> Fault | None:
        return chance.choice(choices) if where(call) and chance.random() < rate else None

    return rule


def at_write(number: int, fault: Fault, where: Choice = anything) -> Rule:
    """Return a rule that injects one fault, at the `number`-th write (from 1) of those that `where` selects."""
    seen = 0

    def rule(call: Call) -> Fault | None:
        nonlocal seen
        seen += call.is_write and where(call)
        return fault if call.is_write and where(call) and seen == number else None

    return rule


def read_call(number: int, writes: int, method: str, path: str, query: Mapping[str, str], agent: str) -> Call:
    """Return the call of an HTTP request; `writes` is the number of earlier writes."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:] if parts[0] == "apis" else []
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in _OF_NAMESPACES:
        namespace, rest = rest[1], rest[2:]
    resource, name, *below = [*rest, "", ""][: max(len(rest), 2)]
    verb = _verb(method, bool(name), query.get("watch") in ("1", "true")) if resource else method.lower()
    resource = "/".join([resource, *below]) if resource else path
    write_number = writes + 1 if verb in WRITES else 0
    return Call(number, write_number, agent, verb, resource, namespace, name)


def _verb(method: str, named: bool, watching: bool) -> str:
    if method == "DELETE":
        return "delete" if named else "deletecollection"
    if method in _VERBS:
        return _VERBS[method]
    return "watch" if watching else "get" if named else "list"
