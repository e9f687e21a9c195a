"""Generation of the CustomResourceDefinition of `FineTuneJob` from the API models.

Kubernetes accepts structural schemas only: no references, no unions, no closed objects. CEL rules
(`x-kubernetes-validations`) express unions; the API server enforces them even if no operator is running.
"""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel

from finetune_api.base import Json, cel
from finetune_api.job import GROUP, KIND, NAME_MAX, NAME_PATTERN, PLURAL, SHORT_NAME, VERSION, FineTuneJob

OPAQUE = "x-kubernetes-preserve-unknown-fields"
VALIDATIONS = "x-kubernetes-validations"
CHANGEABLE = ("runPolicy",)
_BOUNDS = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}
_DROPPED = ("title", "$defs", "const", "additionalProperties")
_COLUMNS = ("phase", "stage", "step", "loss", "eta", "attempt")


@cache
def structural_schema(model: type[BaseModel]) -> Json:
    """Return the structural schema of a model: all definitions inline, no unions.

    It contains one keyword that Kubernetes does not know: `expects`, the description of a pattern. The result is
    cached: copy it before changing it.

    Raises:
        ValueError: a field has a type that a structural schema cannot express.
    """
    schema = model.model_json_schema(by_alias=True)
    return _structural(schema, schema.get("$defs", {}))


def _structural(node: Json, defs: Json) -> Json:
    node = _without_unions(_resolved(node, defs), defs)
    result = {key: value for key, value in node.items() if key not in _DROPPED}
    if "const" in node:
        result["enum"] = [node["const"]]
    for exclusive, bound in _BOUNDS.items():
        if exclusive in node:
            result |= {bound: node[exclusive], exclusive: True}
    if "properties" in node:
        result["properties"] = {name: _structural(value, defs) for name, value in node["properties"].items()}
    if "items" in node:
        result["items"] = _structural(node["items"], defs)
    if isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(node["additionalProperties"], defs)
    if "default" in result:
        result["default"] = _without_nulls(result["default"])
    if result.get("default", ...) is None:
        del result["default"]
    return result


def _resolved(node: Json, defs: Json) -> Json:
    """Replace the `$ref` of `node` by its target.

    The description of the field takes precedence over that of the type.
    """
    if "$ref" not in node:
        return node
    target = defs[node["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _without_unions(node: Json, defs: Json) -> Json:
    """Replace the union of X and null by X: in a job, null and an absent field mean the same."""
    if "oneOf" in node or "allOf" in node:
        raise ValueError(f"a structural schema has no unions: {node}")
    if "anyOf" not in node:
        return node
    members = [member for member in node["anyOf"] if member.get("type") != "null"]
    if len(members) != 1:
        raise ValueError(f"a structural schema has no unions: {node}")
    return {**_resolved(members[0], defs), **{key: value for key, value in node.items() if key != "anyOf"}}


def _without_nulls(default: object) -> object:
    """Remove nulls from a default.

    The default stays complete: the API server validates it before it adds nested defaults.
    """
    if not isinstance(default, dict):
        return default
    return {name: _without_nulls(value) for name, value in default.items() if value is not None}


def crd() -> Json:
    """Return the CustomResourceDefinition (`apiextensions.k8s.io/v1`)."""
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": [SHORT_NAME],
        "categories": ["all"],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": _columns(),
        "schema": {"openAPIV3Schema": _root()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _columns() -> list[Json]:
    """Return the columns of `kubectl get ftj`. A column of type `string` prints a value of any type."""
    columns = [
        {"name": "ETA" if name == "eta" else name.capitalize(), "type": "string", "jsonPath": f".status.{name}"}
        for name in _COLUMNS
    ]
    return [*columns, {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]


def _root() -> Json:
    """Return the schema of the resource. Rules on metadata must be at the root."""
    root: Json = _for_the_api_server(structural_schema(FineTuneJob))
    fields = root["properties"]
    for name in ("apiVersion", "kind"):
        del fields[name]["enum"]
    fields["metadata"] = {"type": "object"}
    fields["status"][OPAQUE] = True
    fields["spec"][VALIDATIONS] += [_unchanged(name) for name in fields["spec"]["properties"] if name not in CHANGEABLE]
    root["required"] = ["spec"]
    root[VALIDATIONS] = [
        cel(f"size(self.metadata.name) <= {NAME_MAX}", f"metadata.name must have at most {NAME_MAX} characters"),
        cel(
            f"self.metadata.name.matches('{NAME_PATTERN}')",
            "metadata.name must consist of lower-case letters, digits and inner dashes, and start with a letter",
        ),
    ]
    return root


def _unchanged(name: str) -> Json:
    """Return the transition rule that a field of the spec is immutable.

    The field always has a value, set or by default.
    CEL cannot read values below `x-kubernetes-preserve-unknown-fields`, but `==` of the parent object compares them
    (apiserver `pkg/cel/common/values.go`, `unstructuredMap.Equal`). It misses one change: a renamed key at the top of
    such an object. This has no effect, because the operator uses the RunConfig of the attempt.
    """
    message = f"{name} is immutable, only {', '.join(CHANGEABLE)} can change: create a new job"
    return cel(f"self.{name} == oldSelf.{name}", message)


def _for_the_api_server(schema: Json) -> Json:
    """Return a deep copy of `schema` without `expects`, and with bounds that the API server evaluates correctly."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return _exact({key: clean(item) for key, item in value.items() if key != "expects"})
        return [clean(item) for item in value] if isinstance(value, list) else value

    result = clean(schema)
    assert isinstance(result, dict)
    return result


def _exact(node: Json) -> Json:
    """Add a CEL rule for each fractional bound that the API server would evaluate wrongly.

    It compares an integer value, such as 0, with the bound truncated to an integer (kube-openapi
    `pkg/validation/validate/values.go`, `MaximumNativeType`): 0 would not be below 0.5, and would be at least 0.01.
    """
    low, high = node.get("minimum"), node.get("maximum")
    rules = []
    if isinstance(low, float) and not low.is_integer() and not node.get("exclusiveMinimum"):
        rules.append(cel(f"self >= {low}", f"expected at least {low}"))
    if isinstance(high, float) and not high.is_integer() and node.get("exclusiveMaximum"):
        node = {key: value for key, value in node.items() if key != "exclusiveMaximum"}
        rules.append(cel(f"self < {high}", f"expected less than {high}"))
    return {**node, VALIDATIONS: [*node.get(VALIDATIONS, []), *rules]} if rules else node
