"""What whoever installs the operator decides, read from its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "FINETUNE_"


@dataclass(frozen=True)
class Settings:
    """Defaults and limits of one operator."""

    image: str = "finetune-trainer:latest"
    """Image of jobs that name none."""
    image_pull_policy: str = "IfNotPresent"
    default_engine: str = ""
    """Engine of jobs with `kubernetes.engine: auto`; empty for the first one that is registered."""
    engines: tuple[str, ...] = ()
    """Engines that jobs may use; empty for all. The operator needs no rights to the objects of the others."""
    token_key: bytes = field(default=b"", repr=False)
    """Each run's token is derived from it, so that the operator never reads the Secrets of jobs."""
    token_key_secret: str = "finetune-operator-token-key"
    """Secret in the operator's own namespace that keeps that key; made where it is missing."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; none means all."""
    service_accounts: tuple[str, ...] = ()
    """Service accounts, beside the default one, that a pod template may name."""
    allow_host_path: bool = False
    """Whether pod templates may mount directories of the node."""
    network_policy: bool = False
    """Whether each run gets a NetworkPolicy that lets only its own pods and the operator in."""
    operator_namespace: str = ""
    """Where the operator runs, for those policies, for the token key and for the Lease."""
    lease: str = "finetune-operator"
    """Lease in that namespace, held by the one operator that is at work; none where it is empty."""
    identity: str = ""
    """Whom the Lease names. Default: this machine's name, which is the pod's."""
    image_pull_seconds: int = 300
    """How long an image may fail to be pulled before the attempt counts as failed."""
    start_seconds: int = 0
    """How long pods may wait for a node before the attempt counts as failed; 0 is for ever."""
    engine_seconds: int = 600
    """How long the controller of an engine may take to start an attempt whose pods are ready, before the attempt counts
    as failed; 0 is no limit. Engines that Kubernetes itself runs have no limit."""
    backoff_seconds: int = 10
    """Wait before the first retry; it doubles with each further one."""
    backoff_cap_seconds: int = 300
    preflight_cpu: str = "1"
    preflight_memory: str = "4Gi"
    helper_queue: str = ""
    """LocalQueue of preflights and clean-ups; where it is empty, that of their job."""
    helper_queue_seconds: int = 86400
    """How long a queue may hold a preflight or a clean-up before it counts as failed; 0 is for ever."""
    poll_seconds: float = 5.0
    """Pause between two looks at a running attempt."""
    status_seconds: float = 10.0
    """Least time between two writes of mere progress to one job's status."""
    status_writes_per_second: float = 10.0
    """Most such writes, all jobs together."""
    ray_version: str = ""
    """Version of Ray in the trainer image, for engines whose controller needs to know it."""
    watch_silence_seconds: int = 660
    """Silence after which the probe looks whether the watch of jobs has died; it is renewed every minute."""
    metrics_port: int = 9090
    health_port: int = 8080


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `FINETUNE_<FIELD>` variables; `FINETUNE_TOKEN_KEY_FILE` may name a file with the token key.

    Raises:
        ValueError: a variable has the wrong form.
    """
    found: dict[str, object] = {}
    for name, info in Settings.__dataclass_fields__.items():
        text = environment.get(PREFIX + name.upper())
        if text is not None and name != "token_key":
            found[name] = _parsed(name, text, str(info.type))
    key_file = environment.get(PREFIX + "TOKEN_KEY_FILE")
    if key_file:
        found["token_key"] = Path(key_file).read_bytes().strip()
    return Settings(**found)  # type: ignore[arg-type]


def _parsed(name: str, text: str, kind: str) -> object:
    if kind.startswith("tuple"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{PREFIX}{name.upper()} is {text!r}, expected true or false")
        return text.lower() == "true"
    parse = {"int": int, "float": float}.get(kind, str)
    try:
        return parse(text)
    except ValueError:
        raise ValueError(f"{PREFIX}{name.upper()} is {text!r}, expected a number") from None
