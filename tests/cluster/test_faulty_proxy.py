"""The proxy forwards and counts all requests, and injects exactly the faults of its rule."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client, watch
from support.cluster.access import Access, until
from support.cluster.api_calls import Call, Fault, at_write, read_call, schedule
from support.cluster.faulty_proxy import FaultyProxy
from urllib3.exceptions import HTTPError

CALLS = [
    ("GET", "/api/v1/nodes", {}, ("list", "nodes", "", "")),
    ("GET", "/api/v1/namespaces/a/pods/b", {}, ("get", "pods", "a", "b")),
    ("GET", "/api/v1/namespaces/a/pods", {"watch": "true"}, ("watch", "pods", "a", "")),
    ("PATCH", "/apis/x.dev/v1/namespaces/a/things/b/status", {}, ("patch", "things/status", "a", "b")),
    ("POST", "/apis/batch/v1/namespaces/a/jobs", {}, ("create", "jobs", "a", "")),
    ("PUT", "/api/v1/namespaces/a/finalize", {}, ("update", "namespaces/finalize", "", "a")),
    ("DELETE", "/api/v1/namespaces/a", {}, ("delete", "namespaces", "", "a")),
    ("DELETE", "/api/v1/namespaces/a/pods", {}, ("deletecollection", "pods", "a", "")),
    ("GET", "/readyz", {}, ("get", "/readyz", "", "")),
    ("GET", "/apis/batch/v1", {}, ("get", "/apis/batch/v1", "", "")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "query", "expected"), CALLS, ids=lambda value: str(value)[:60])
def test_a_request_in_rbac_s_words(
    method: str, path: str, query: dict[str, str], expected: tuple[str, str, str, str]
) -> None:
    call = read_call(1, 0, method, path, query, "agent")
    assert (call.verb, call.resource, call.namespace, call.name) == expected
    assert call.write_number == (method != "GET")


def test_a_seed_gives_the_same_faults_again() -> None:
    def strikes(seed: int) -> list[bool]:
        rule = schedule(seed, 0.3, [Fault("drop")], lambda call: call.is_write)
        calls = [read_call(n, n, "POST" if n % 2 else "GET", "/api/v1/nodes", {}, "") for n in range(200)]
        return [rule(call) is not None for call in calls]

    assert strikes(1) == strikes(1) != strikes(2)
    assert 15 < sum(strikes(1)) < 45
    assert not any(strikes(1)[::2])


@pytest.fixture
def through(proxy: FaultyProxy, admin: Access) -> Iterator[client.CoreV1Api]:
    """Return a client of the proxy that sends each request once, without retries."""
    with admin.at(proxy.url).client("tester/1") as api:
        api.rest_client.pool_manager.connection_pool_kw["retries"] = False
        yield client.CoreV1Api(api)


def config_map(name: str = "a") -> client.V1ConfigMap:
    return client.V1ConfigMap(metadata=client.V1ObjectMeta(name=name), data={"x": "y" * 1000})


def names(core: client.CoreV1Api, namespace: str) -> set[str]:
    return {item.metadata.name for item in core.list_namespaced_config_map(namespace).items} - {"kube-root-ca.crt"}


def test_what_passes_is_counted(proxy: FaultyProxy, through: client.CoreV1Api, namespace: str) -> None:
    through.create_namespaced_config_map(namespace, config_map())
    through.patch_namespaced_config_map("a", namespace, {"data": {"x": "z"}})
    assert through.read_namespaced_config_map("a", namespace).data == {"x": "z"}
    expected = {("tester/1", verb, "configmaps"): 1 for verb in ("create", "patch", "get")}
    assert proxy.counts() == expected
    assert [call.write_number for call in proxy.calls] == [1, 2, 0]
    proxy.reset()
    assert not proxy.counts()


def test_kubectl_works_through_it(proxy: FaultyProxy, admin: Access, namespace: str) -> None:
    admin.at(proxy.url).apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "k"}}, namespace=namespace)
    assert any(agent.startswith("kubectl") and verb == "patch" for agent, verb, _ in proxy.counts())


@pytest.mark.parametrize("code", [409, 410, 429, 500, 503])
def test_an_answered_request_never_arrives(
    proxy: FaultyProxy, through: client.CoreV1Api, core: client.CoreV1Api, namespace: str, code: int
) -> None:
    proxy.rule = at_write(1, Fault("answer", status=code))
    with pytest.raises(client.ApiException) as refused:
        through.create_namespaced_config_map(namespace, config_map())
    assert refused.value.status == code
    assert json.loads(refused.value.body)["code"] == code
    assert names(core, namespace) == set()
    through.create_namespaced_config_map(namespace, config_map())
    assert [(call.verb, fault.status) for call, fault in proxy.faults] == [("create", code)]


@pytest.mark.parametrize(("kind", "arrives"), [("drop", False), ("lose", True)])
def test_a_broken_connection_before_and_after_the_deed(
    proxy: FaultyProxy, through: client.CoreV1Api, core: client.CoreV1Api, namespace: str, kind: Any, arrives: bool
) -> None:
    seen: list[set[str]] = []
    proxy.rule = at_write(1, Fault(kind, then=lambda: seen.append(names(core, namespace))))
    with pytest.raises(HTTPError):
        through.create_namespaced_config_map(namespace, config_map())
    assert seen == [{"a"} if arrives else set()]
    assert names(core, namespace) == seen[0]


def test_a_delayed_request_arrives_late(
    proxy: FaultyProxy, through: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    struck = threading.Event()
    proxy.rule = at_write(1, Fault("delay", seconds=1, then=struck.set))
    writer = threading.Thread(target=through.create_namespaced_config_map, args=(namespace, config_map()))
    writer.start()
    assert struck.wait(10)
    assert names(core, namespace) == set()
    writer.join()
    assert names(core, namespace) == {"a"}


def test_a_watch_streams_and_can_be_cut(
    proxy: FaultyProxy, through: client.CoreV1Api, core: client.CoreV1Api, namespace: str
) -> None:
    proxy.rule = lambda call: Fault("cut", chunks=2) if call.verb == "watch" else None
    events = watch.Watch().stream(through.list_namespaced_config_map, namespace=namespace, timeout_seconds=60)
    core.create_namespaced_config_map(namespace, config_map("before"))
    seen = {next(events)["object"].metadata.name}
    core.create_namespaced_config_map(namespace, config_map("after"))
    with pytest.raises(HTTPError):
        seen |= {event["object"].metadata.name for event in events}
    assert len([call for call in proxy.calls if call.verb == "watch"]) == 1


def test_a_watch_is_told_that_it_is_too_old(proxy: FaultyProxy, through: client.CoreV1Api, namespace: str) -> None:
    def once(call: Call) -> Fault | None:
        return Fault("answer", status=410) if call.verb == "watch" and not proxy.faults else None

    proxy.rule = once
    with pytest.raises(client.ApiException, match="injected fault") as refused:
        until(through.list_namespaced_config_map, lambda item: False, timeout=2, namespace=namespace)
    assert refused.value.status == 410
