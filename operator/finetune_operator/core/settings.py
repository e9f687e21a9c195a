"""The operator's settings, read from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "FINETUNE_"


@dataclass(frozen=True)
class Settings:
    """Settings of one operator. Each field is read from the environment variable `FINETUNE_<FIELD>`."""

    image: str = "finetune-trainer:latest"
    """Image of jobs that do not set `kubernetes.image`."""
    image_pull_policy: str = "IfNotPresent"
    default_engine: str = ""
    """Engine of jobs with `kubernetes.engine: auto`; empty for the first one that is registered."""
    engines: tuple[str, ...] = ()
    """Engines that jobs may use; empty for all. The operator needs no rights to the objects of the others."""
    token_key: bytes = field(default=b"", repr=False)
    """Key that each run's token is derived from, so that the operator never reads the Secrets of jobs."""
    token_key_secret: str = "finetune-operator-token-key"
    """Secret in the operator's own namespace that stores the token key; the operator creates it if it is missing."""
    namespaces: tuple[str, ...] = ()
    """Namespaces to watch; empty means all."""
    service_accounts: tuple[str, ...] = ()
    """Service accounts, besides `default`, that a pod template may name."""
    allow_host_path: bool = False
    """Whether pod templates may mount `hostPath` and `nfs` volumes."""
    network_policy: bool = False
    """Whether each run gets a NetworkPolicy that admits traffic only from its own pods and from the operator."""
    operator_namespace: str = ""
    """Namespace of the operator: for network policies, the token key's Secret and the Lease."""
    lease: str = "finetune-operator"
    """Lease in that namespace for leader election; empty switches leader election off."""
    lease_duration_seconds: int = 15
    """How long other operators wait after the last renewal before they take the Lease."""
    lease_renew_deadline_seconds: float = 10.0
    """How long after its last renewal an operator stops acting; less than `lease_duration_seconds`."""
    lease_retry_seconds: float = 2.0
    """Interval between two calls that renew or try to acquire the Lease."""
    identity: str = ""
    """Holder identity in the Lease. Default: the host name, which is the pod's name."""
    image_pull_seconds: int = 300
    """How long an image pull may fail before the attempt counts as failed."""
    start_seconds: int = 0
    """How long pods may be unschedulable before the attempt counts as failed; 0 means no limit."""
    engine_seconds: int = 600
    """How long the controller of an engine may take to start an attempt whose pods are ready, before the attempt counts
    as failed; 0 is no limit. Engines that Kubernetes itself runs have no limit."""
    backoff_seconds: int = 10
    """Delay before the first retry; it doubles with each further retry, up to `backoff_cap_seconds`."""
    backoff_cap_seconds: int = 300
    preflight_cpu: str = "1"
    preflight_memory: str = "4Gi"
    helper_queue: str = ""
    """LocalQueue (Kueue) of preflights and clean-ups; empty means the LocalQueue of their job."""
    helper_queue_seconds: int = 86400
    """How long a queue may hold a preflight or a clean-up before it counts as failed; 0 means no limit."""
    poll_seconds: float = 5.0
    """Interval between two polls of a running attempt's report."""
    status_seconds: float = 10.0
    """Minimum time between two writes of progress to one job's status."""
    status_writes_per_second: float = 10.0
    """Maximum rate of these writes, all jobs together."""
    ray_version: str = ""
    """Version of Ray in the trainer image, for engines whose controller needs to know it."""
    watch_silence_seconds: int = 660
    """Seconds without an event of the FineTuneJob watch after which the liveness probe compares the cache with the API
    server."""
    metrics_port: int = 9090
    health_port: int = 8080


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings from `FINETUNE_<FIELD>` variables; `FINETUNE_TOKEN_KEY_FILE` names a file with the token key.

    Raises:
        ValueError: A variable has an invalid value, or the Lease's times contradict each other.
    """
    found: dict[str, object] = {}
    for name, info in Settings.__dataclass_fields__.items():
        text = environment.get(PREFIX + name.upper())
        if text is not None and name != "token_key":
            found[name] = _parsed(name, text, str(info.type))
    key_file = environment.get(PREFIX + "TOKEN_KEY_FILE")
    if key_file:
        found["token_key"] = Path(key_file).read_bytes().strip()
    settings = Settings(**found)  # type: ignore[arg-type]  # each value has the type of its field
    _check_lease_times(settings)
    return settings


def _check_lease_times(settings: Settings) -> None:
    duration, deadline = settings.lease_duration_seconds, settings.lease_renew_deadline_seconds
    if not duration > deadline > settings.lease_retry_seconds > 0:
        raise ValueError(
            f"{PREFIX}LEASE_DURATION_SECONDS ({duration}), {PREFIX}LEASE_RENEW_DEADLINE_SECONDS ({deadline:g}) and "
            f"{PREFIX}LEASE_RETRY_SECONDS ({settings.lease_retry_seconds:g}): each must be greater than the next, and "
            "the last greater than 0"
        )


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
