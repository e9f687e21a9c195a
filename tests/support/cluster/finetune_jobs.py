"""FineTuneJobs on the API server, and the trainer's report port without a real pod."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kubernetes import client
from support.cluster.access import until, until_gone
from support.cluster.operator_process import KEY

from finetune_api.job import API_VERSION, GROUP, KIND, PLURAL, VERSION
from finetune_api.report import PORT
from finetune_operator.render.support import token
from finetune_trainer.progress.attempt_report import AttemptReporter
from finetune_trainer.progress.report_server import ReportServer

Json = dict[str, Any]
TITLES = ["tokenizer", "pretrain"]


def job(name: str = "tiny", **spec: Any) -> Json:
    """Return a job of two stages on a claim; `spec` replaces its fields."""
    data = {"sources": [{"inline": [{"text": "to be or not to be"}] * 4}]}
    fields: Json = {
        "model": {"config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}},
        "stages": [{"tokenizer": {"data": data, "vocabSize": 300}}, {"pretrain": {"data": data, "maxSteps": 10}}],
        "storage": {"uri": "pvc://results/runs"},
        "kubernetes": {"preflight": False},
    }
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": fields | spec}


class Jobs:
    """The FineTuneJobs of one namespace."""

    def __init__(self, api: client.CustomObjectsApi, namespace: str) -> None:
        self.api, self.namespace = api, namespace

    def create(self, body: Json) -> Json:
        made: Json = self.api.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, body)
        return made

    def read(self, name: str = "tiny") -> Json:
        found: Json = self.api.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)
        return found

    def patch(self, name: str, spec: Json) -> None:
        self.api.patch_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, {"spec": spec})

    def delete(self, name: str = "tiny") -> None:
        self.api.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)

    def until_gone(self, name: str) -> None:
        until_gone(
            self.api.list_namespaced_custom_object,
            name,
            group=GROUP,
            version=VERSION,
            namespace=self.namespace,
            plural=PLURAL,
        )

    def until(self, wanted: Callable[[Json], bool], name: str = "tiny", timeout: float = 40) -> Json:
        """Wait until the status is as wanted, and return the job."""
        listing = self.api.list_namespaced_custom_object
        found: Json = until(
            listing,
            lambda item: bool(item.get("status")) and wanted(item["status"]),
            timeout=timeout,
            group=GROUP,
            version=VERSION,
            namespace=self.namespace,
            plural=PLURAL,
            field_selector=f"metadata.name={name}",
        )
        return found

    def until_phase(self, phase: str, name: str = "tiny", timeout: float = 40) -> Json:
        return self.until(lambda status: status.get("phase") == phase, name, timeout)


def condition(body: Json, kind: str) -> Json:
    """Return a condition of a job, or an empty one where that type is missing."""
    return next((item for item in body["status"]["conditions"] if item["type"] == kind), {})


class Driver:
    """The part of a driver's pod that the operator sees: the trainer's reporter and its HTTP port."""

    def __init__(self, titles: list[str]) -> None:
        self.reporter = AttemptReporter(titles)
        self.asked_to_stop = threading.Event()


@contextmanager
def driver(uid: str, run: int, ip: str = "127.0.0.1", titles: list[str] = TITLES) -> Iterator[Driver]:
    """Start a driver that answers at `ip` with the token of that run; `titles` are the names of the stages."""
    made = Driver(titles)

    def stop() -> None:
        made.reporter.stopping()
        made.asked_to_stop.set()

    with ReportServer(made.reporter.report, stop, token(KEY, uid, run), (ip, PORT)):
        yield made
