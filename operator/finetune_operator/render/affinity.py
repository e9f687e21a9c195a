"""Node affinity that keeps an attempt away from nodes with broken GPUs (pure)."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def away_from(nodes: tuple[str, ...], affinity: object) -> Json:
    """Return a pod's affinity with the condition that it must not run on these nodes.

    Terms of `nodeSelectorTerms` are alternatives, so each of them gets the condition. A field selector takes one value
    only (Kubernetes' `ValidateNodeFieldSelectorRequirement`), so each node gets an expression of its own.

    Args:
        affinity: the pod template's own affinity, of whatever type the user wrote.
    """
    whole = _mapping(affinity)
    of_nodes = _mapping(whole.get("nodeAffinity"))
    required = _mapping(of_nodes.get(_REQUIRED))
    given = required.get("nodeSelectorTerms")
    expressions = _elsewhere(nodes)
    terms = [_with(term, expressions) for term in given] if isinstance(given, list) and given else None
    required["nodeSelectorTerms"] = terms or [{"matchFields": expressions}]
    return whole | {"nodeAffinity": of_nodes | {_REQUIRED: required}}


def rather_away_from(nodes: tuple[str, ...], affinity: object) -> Json:
    """Return a pod's affinity with the preference, of the greatest weight, not to run on these nodes."""
    whole = _mapping(affinity)
    if not nodes:
        return whole
    of_nodes = _mapping(whole.get("nodeAffinity"))
    given = of_nodes.get(_PREFERRED)
    own = {"weight": 100, "preference": {"matchFields": _elsewhere(nodes)}}
    return whole | {"nodeAffinity": of_nodes | {_PREFERRED: [*(given if isinstance(given, list) else []), own]}}


def _elsewhere(nodes: tuple[str, ...]) -> list[Json]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]


def _with(term: object, expressions: list[Json]) -> object:
    """An empty term matches no node, and one of another type is the API server's to refuse: both stay as they are."""
    if not isinstance(term, dict) or not term:
        return term
    fields = term.get("matchFields")
    return {**term, "matchFields": [*(fields if isinstance(fields, list) else []), *expressions]}


def _mapping(value: object) -> Json:
    return dict(value) if isinstance(value, dict) else {}
