"""Node affinity that keeps an attempt away from nodes with broken GPUs (pure)."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def exclude_nodes(nodes: tuple[str, ...], affinity: object) -> Json:
    """Return a pod's affinity with the requirement that the pod does not run on these nodes.

    Terms of `nodeSelectorTerms` are alternatives, so each of them gets the requirement. A field selector takes one
    value only (Kubernetes' `ValidateNodeFieldSelectorRequirement`), so each node gets an expression of its own.

    Args:
        nodes: names of nodes.
        affinity: the affinity of the pod template. Its type is not checked before.
    """
    whole = _mapping(affinity)
    of_nodes = _mapping(whole.get("nodeAffinity"))
    required = _mapping(of_nodes.get(_REQUIRED))
    templated = required.get("nodeSelectorTerms")
    expressions = _not_on(nodes)
    terms = [_with(term, expressions) for term in templated] if isinstance(templated, list) and templated else None
    required["nodeSelectorTerms"] = terms or [{"matchFields": expressions}]
    return whole | {"nodeAffinity": of_nodes | {_REQUIRED: required}}


def avoid_nodes(nodes: tuple[str, ...], affinity: object) -> Json:
    """Return a pod's affinity with the preference, of the greatest weight, that the pod does not run on these nodes."""
    whole = _mapping(affinity)
    if not nodes:
        return whole
    of_nodes = _mapping(whole.get("nodeAffinity"))
    templated = of_nodes.get(_PREFERRED)
    own = {"weight": 100, "preference": {"matchFields": _not_on(nodes)}}
    return whole | {"nodeAffinity": of_nodes | {_PREFERRED: [*(templated if isinstance(templated, list) else []), own]}}


def _not_on(nodes: tuple[str, ...]) -> list[Json]:
    return [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]


def _with(term: object, expressions: list[Json]) -> object:
    """Return a term with more expressions.

    An empty term, which matches no node, and a term of another type, which the API server refuses, stay as they are.
    """
    if not isinstance(term, dict) or not term:
        return term
    fields = term.get("matchFields")
    return {**term, "matchFields": [*(fields if isinstance(fields, list) else []), *expressions]}


def _mapping(value: object) -> Json:
    return dict(value) if isinstance(value, dict) else {}
