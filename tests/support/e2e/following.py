"""A thread that follows a job during faults: its steps by the driver's report, and its status."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kubernetes import client
from support.cluster.access import Access

from finetune_api.job import GROUP, PLURAL, VERSION
from finetune_api.labels import JOB_LABEL, RUN_LABEL
from finetune_api.report import PORT, REPORT_PATH

Json = dict[str, Any]
PAUSE_SECONDS, LOOK_SECONDS, TIMEOUT_SECONDS = 0.2, 1.0, 2.0
INDEX, RAY_TYPE = "batch.kubernetes.io/job-completion-index", "ray.io/node-type"


@dataclass(frozen=True)
class Sample:
    """The newest step in a driver's report, at `at` seconds of this process's clock."""

    at: float
    attempt: int
    stage: int
    step: int

    @property
    def position(self) -> tuple[int, int]:
        return self.stage, self.step


@dataclass(frozen=True)
class Recovery:
    """The recovery of training from a fault."""

    seconds: float
    """From the fault to the first new step after the interruption, or the longest pause between two steps."""
    broken: bool
    """Whether training had to start again."""
    repeated: int
    """Steps that were repeated."""


@dataclass
class Following:
    """A context manager: a thread that records the steps and statuses of one job.

    Args:
        direct: whether this machine reaches pods by their addresses.
    """

    admin: Access
    namespace: str
    name: str
    direct: bool = True
    samples: list[Sample] = field(default_factory=list)
    words: list[tuple[float, str]] = field(default_factory=list)
    """The phase with the reason and message of the main condition, at each change."""
    status: Json = field(default_factory=dict)
    silences: list[tuple[float, str]] = field(default_factory=list)
    """Why the API server or the driver was unreachable, at each change; an empty text means reachable again."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._driver: tuple[int, str, str] | None = None

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def until(self, wanted: Callable[[Following], bool], seconds: float, what: str) -> None:
        """Wait until `wanted` is true.

        Raises:
            AssertionError: it takes too long, or the job has failed.
        """
        deadline = time.monotonic() + seconds
        while not wanted(self):
            said = json.dumps(self.status, indent=1)[-4000:]
            assert time.monotonic() < deadline, f"{self.name}: {what}: not within {seconds} s: {said}"
            assert self.status.get("phase") != "Failed", f"{self.name}: {what}: {said}"
            time.sleep(PAUSE_SECONDS)

    def until_step(self, step: int, seconds: float, stage: int = 1) -> None:
        self.until(lambda it: bool(it.samples) and it.samples[-1].position >= (stage, step), seconds, f"step {step}")

    def said_since(self, then: float) -> list[str]:
        """Return the distinct statuses since then."""
        return list(dict.fromkeys(text for at, text in self.words if at >= then))

    def silences_since(self, then: float) -> list[str]:
        """Return the times without an answer, in seconds since then."""
        return [f"{at - then:.0f} s: {text or 'heard again'}" for at, text in self.silences if at >= then]

    def recovery(self, struck: float) -> Recovery | None:
        """Return the recovery from the fault at `struck`, or None before training continues."""
        return recovery(self.samples, struck)

    def _run(self) -> None:
        looked = 0.0
        while not self._over.wait(PAUSE_SECONDS):
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                try:
                    with self.admin.client() as api:
                        self._look(api)
                except Exception as error:  # the tests include outages of the API server
                    self._silent(f"API server: {error!r:.120}")
            self._ask()

    def _silent(self, text: str) -> None:
        if (self.silences[-1][1] if self.silences else "") != text:
            self.silences.append((time.monotonic(), text))

    def _look(self, api: client.ApiClient) -> None:
        jobs = client.CustomObjectsApi(api)
        body = jobs.get_namespaced_custom_object(
            GROUP, VERSION, self.namespace, PLURAL, self.name, _request_timeout=TIMEOUT_SECONDS
        )
        self.status = body.get("status") or {}
        text = _words(self.status)
        if text and (not self.words or self.words[-1][1] != text):
            self.words.append((time.monotonic(), text))
        self._find_driver(client.CoreV1Api(api))

    def _find_driver(self, core: client.CoreV1Api) -> None:
        attempt = int(self.status.get("attempt") or 0)
        selector = f"{JOB_LABEL}={self.name},{RUN_LABEL}={attempt}"
        pods = core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS).items
        address = next((pod.status.pod_ip for pod in pods if pod.status.pod_ip and _drives(pod)), None)
        if address is None:
            self._driver = None
        elif self._driver is None or self._driver[:2] != (attempt, address):
            secrets = core.list_namespaced_secret(self.namespace, label_selector=selector).items
            (found,) = (self.admin.kubectl("get", "secret", f"--namespace={self.namespace}", secrets[0].metadata.name,
                                           "--template={{.data.auth_token | base64decode}}").stdout,)  # fmt: skip
            self._driver = (attempt, address, found)

    def _ask(self) -> None:
        report = self._report() if self.direct else self._from_status()
        step, stage = (report.get("step") or {}).get("step"), report.get("current")
        attempt = self._driver[0] if self._driver else int(self.status.get("attempt") or 0)
        if step is not None and stage is not None:
            sample = Sample(time.monotonic(), attempt, stage, step)
            if not self.samples or _key(self.samples[-1]) != _key(sample):
                self.samples.append(sample)

    def _report(self) -> Json:
        if self._driver is None:
            return {}
        _, address, token = self._driver
        request = urllib.request.Request(f"http://{address}:{PORT}{REPORT_PATH}",
                                         headers={"Authorization": f"Bearer {token}"})  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                found: Json = json.loads(answer.read())
                self._silent("")
                return found
        except (OSError, ValueError) as error:
            self._silent(f"driver at {address}: {error!r:.120}")
            return {}

    def _from_status(self) -> Json:
        progress = self.status.get("progress") or {}
        return {"step": progress, "current": progress.get("stageIndex")}


def recovery(samples: list[Sample], struck: float) -> Recovery | None:
    """Compute `Following.recovery` from samples."""
    after = [index for index, sample in enumerate(samples) if sample.at > struck]
    if not after:
        return None
    breaks = [index for index in after if index and _starts_again(samples[index - 1], samples[index])]
    if breaks:
        last = breaks[-1]
        here = samples[last]
        highest = max((sample.step for sample in samples[:last] if sample.stage == here.stage), default=0)
        return Recovery(here.at - struck, True, max(0, highest - here.step + 1))
    times = [struck, *(samples[index].at for index in after)]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    return Recovery(max(pauses), False, 0)


def _starts_again(before: Sample, now: Sample) -> bool:
    return now.attempt != before.attempt or now.position < before.position


def _key(sample: Sample) -> tuple[int, int, int]:
    return sample.attempt, sample.stage, sample.step


def _words(status: Json) -> str:
    """Return the phase with the main condition, and the end of the last attempt before a new one."""
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    order = ("Failed", "Succeeded", "Suspended", "Running", "Planned")
    shown = (conditions.get(kind) for kind in order)
    waited_for = ("Running", "Planned")
    told = next((item for item in shown if item and (item["status"] == "True" or item["type"] in waited_for)), None)
    parts = [status.get("phase", ""), told["reason"] if told else ""]
    ended = [item for item in status.get("attempts") or [] if "endTime" in item]
    if ended and ended[-1]["reason"] != "Completed":
        last = ended[-1]
        parts.append(f"attempt {last['number']} ended: {last['reason']}: {last.get('message', '')[:160]}")
    elif told and told.get("message"):
        parts.append(told["message"][:160])
    return " · ".join(filter(None, parts))


def _drives(pod: client.V1Pod) -> bool:
    """Whether it is the pod of the Ray head and the driver, with either engine."""
    labels = pod.metadata.labels
    return bool(labels.get(INDEX) == "0" or labels.get(RAY_TYPE) == "head")
