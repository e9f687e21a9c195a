"""The CustomResourceDefinition of `FineTuneJob`, generated from the models.

Kubernetes takes *structural* schemas only: no references, no unions, no closed objects. What a union would say is in
CEL rules beside the fields (`x-kubernetes-validations`), which the API server enforces with no operator running.
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
    """The structural schema of a model: everything inline, no unions.

    It has one keyword that Kubernetes doesn't know: `expects`, a pattern in plain words. The result is shared: copy it
    before changing it.

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
    """`node` with its `$ref` replaced by what it names; a field's own description wins over its type's."""
    if "$ref" not in node:
        return node
    target = defs[node["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _without_unions(node: Json, defs: Json) -> Json:
    """`node` with «X or null» as X: in a job, null and absent are one."""
    if "oneOf" in node or "allOf" in node:
        raise ValueError(f"a structural schema has no unions: {node}")
    if "anyOf" not in node:
        return node
    members = [member for member in node["anyOf"] if member.get("type") != "null"]
    if len(members) != 1:
        raise ValueError(f"a structural schema has no unions: {node}")
    return {**_resolved(members[0], defs), **{key: value for key, value in node.items() if key != "anyOf"}}


def _without_nulls(default: object) -> object:
    """A default whole, for the API server holds it against the rules before it fills in what the fields default to."""
    if not isinstance(default, dict):
        return default
    return {name: _without_nulls(value) for name, value in default.items() if value is not None}


def crd() -> Json:
    """The CustomResourceDefinition, as `apiextensions.k8s.io/v1` has it."""
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
    """What `kubectl get ftj` shows. A `string` column prints a value of any type."""
    columns = [
        {"name": "ETA" if name == "eta" else name.capitalize(), "type": "string", "jsonPath": f".status.{name}"}
        for name in _COLUMNS
    ]
    return [*columns, {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]


def _root() -> Json:
    """The resource's schema; its metadata are the API server's own and take rules from the root alone."""
    root: Json = _for_the_api_server(structural_schema(FineTuneJob))
    fields = root["properties"]
    for name in ("apiVersion", "kind"):
        del fields[name]["enum"]
    fields["metadata"] = {"type": "object"}
    fields["status"][OPAQUE] = True
    fields["spec"][VALIDATIONS] += [_unchanged(name) for name in fields["spec"]["properties"] if name not in CHANGEABLE]
    root["required"] = ["spec"]
    root[VALIDATIONS] = [
        cel(f"size(self.metadata.name) <= {NAME_MAX}", f"metadata.name has at most {NAME_MAX} characters"),
        cel(
            f"self.metadata.name.matches('{NAME_PATTERN}')",
            "metadata.name has lower-case letters, digits and inner dashes, a letter first",
        ),
    ]
    return root


def _unchanged(name: str) -> Json:
    """The transition rule «this field of the spec never changes»; it has a value always, given or by default.

    Values below `x-kubernetes-preserve-unknown-fields` cannot be read in CEL, but `==` of the object above compares
    them (apiserver `pkg/cel/common/values.go`, `unstructuredMap.Equal`). One change escapes it: a key at the top of
    such an object that is renamed. The operator works from the attempt's snapshot, so that changes nothing.
    """
    message = f"{name} cannot change, only {', '.join(CHANGEABLE)} can: make a new job"
    return cel(f"self.{name} == oldSelf.{name}", message)


def _for_the_api_server(schema: Json) -> Json:
    """A deep copy of `schema` without `expects` anywhere, and with bounds as the API server understands them."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return _exact({key: clean(item) for key, item in value.items() if key != "expects"})
        return [clean(item) for item in value] if isinstance(value, list) else value

    result = clean(schema)
    assert isinstance(result, dict)
    return result


def _exact(node: Json) -> Json:
    """`node` with a rule for each fractional bound that the API server would get wrong.

    It holds a whole number, such as 0, against the bound cut to a whole number (kube-openapi `pkg/validation/validate/
    values.go`, `MaximumNativeType`): 0 would not be below 0.5, and would be at least 0.01.
    """
    low, high = node.get("minimum"), node.get("maximum")
    rules = []
    if isinstance(low, float) and not low.is_integer() and not node.get("exclusiveMinimum"):
        rules.append(cel(f"self >= {low}", f"expected at least {low}"))
    if isinstance(high, float) and not high.is_integer() and node.get("exclusiveMaximum"):
        node = {key: value for key, value in node.items() if key != "exclusiveMaximum"}
        rules.append(cel(f"self < {high}", f"expected less than {high}"))
    return {**node, VALIDATIONS: [*node.get(VALIDATIONS, []), *rules]} if rules else node
