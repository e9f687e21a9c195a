"""Lookups in the registered engines: which engine runs a job, and what decisions need to know of it (pure)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from finetune_operator.core.settings import Settings
from finetune_operator.core.snapshot import EngineFacts, PodNode, PodView, RunView, controller_of, pod_view
from finetune_operator.engines import ENGINES, Engine
from finetune_operator.render.run import Run

Json = dict[str, Any]
AUTO = "auto"


def allowed_engines(settings: Settings) -> list[Engine]:
    """Return the engines that jobs may use."""
    return [engine for engine in ENGINES.values() if not settings.engines or engine.name in settings.engines]


def check_engines(settings: Settings) -> None:
    """Check that the settings name registered engines.

    Raises:
        ValueError: they name another one.
    """
    for name in (*settings.engines, *filter(None, [settings.default_engine])):
        if name not in ENGINES:
            raise ValueError(f"the settings name the engine {name!r}, expected one of {', '.join(ENGINES)}")


def requested_engine(spec: Json, settings: Settings) -> Engine:
    """Return the engine that a job's `spec` names, or the operator's default."""
    name = spec.get("kubernetes", {}).get("engine", AUTO)
    return ENGINES[(settings.default_engine or next(iter(ENGINES))) if name == AUTO else name]


def engine_for(run: Run) -> Engine:
    """Return the engine that runs a run: the job's own for an attempt, and one engine for all helpers."""
    if run.is_attempt:
        return requested_engine(run.spec, run.settings)
    return next(engine for engine in ENGINES.values() if engine.runs_helpers)


def facts(spec: Json, settings: Settings, available: Collection[str]) -> EngineFacts:
    """Return what a decision about a job needs to know of engines.

    Args:
        spec: the job's `spec`.
        settings: the operator's settings.
        available: names of the engines that the cluster serves and that the settings allow.
    """
    engine = requested_engine(spec, settings)
    return EngineFacts(
        missing="" if engine.name in available else _missing(engine, settings),
        refusals=tuple(engine.refusals(spec)),
        start_seconds={name: known.start_seconds(settings) for name, known in ENGINES.items()},
        own_labels=tuple(dict.fromkeys(label for known in ENGINES.values() for label in known.own_labels)),
    )


def _missing(engine: Engine, settings: Settings) -> str:
    if engine not in allowed_engines(settings):
        return f"kubernetes.engine is {engine.name}, which the settings of this operator switch off"
    lacks = f"this cluster has no {engine.api_version} {engine.kind}"
    return f"kubernetes.engine is {engine.name}, but {lacks}" + (f": {engine.remedy}" if engine.remedy else "")


def observe_run(body: Json) -> RunView | None:
    """Return the run whose main object this is; None for any other object."""
    views = (engine.observe(body) for engine in ENGINES.values() if engine.made(body))
    return next(filter(None, views), None)


def observe_pod(body: Json) -> PodView | None:
    """Return a pod of a run, whichever engine created it; None for any other pod."""
    metadata = body["metadata"]
    located = (engine.locate(metadata) for engine in ENGINES.values())
    unknown = PodNode(index=0, owner=str(controller_of(metadata).get("uid", "")))
    return pod_view(body, next(filter(None, located), unknown))
