"""The CRD is a structural schema with bounds and descriptions, and it matches the pydantic models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from finetune_api.cluster import RunPolicy
from finetune_api.crd import crd, structural_schema
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.validation import _model_in, check_job

ROOT: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC: dict[str, Any] = ROOT["properties"]["spec"]
ALLOWED = {
    "additionalProperties",
    "default",
    "description",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "nullable",
    "pattern",
    "properties",
    "required",
    "type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
}
CLIENT_SIDE_APPLY_LIMIT = 262_144
"""Maximum bytes of a manifest that `kubectl apply` can keep in its annotation, as JSON without spaces."""


def nodes(schema: dict[str, Any], path: str = "spec") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


NODES = dict(nodes(SPEC))


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """Return `value` with defaults filled in from the outside in, as the API server does it."""
    if isinstance(value, list):
        return [with_defaults(schema.get("items", {}), item) for item in value]
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    known = schema["properties"]
    given = {name: inner["default"] for name, inner in known.items() if "default" in inner} | value
    return {name: with_defaults(known.get(name, {}), item) for name, item in given.items()}


def models(model: type[BaseModel] = FineTuneJob) -> set[type[BaseModel]]:
    inner = [found for info in model.model_fields.values() if (found := _model_in(info.annotation))]
    return {model}.union(*map(models, inner))


def generator() -> ModuleType:
    path = Path(__file__).parents[2] / "crds" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_keywords_of_structural_schemas() -> None:
    unknown = {(path, key) for path, node in NODES.items() for key in node if key not in ALLOWED}
    assert not unknown
    assert len(NODES) > 400


def test_every_node_has_one_type() -> None:
    typed = {"string", "integer", "number", "boolean", "array", "object"}
    for path, node in NODES.items():
        assert node.get("type") in typed or node.get("x-kubernetes-int-or-string"), path
        assert node.get("type") != "array" or "items" in node, path
        opaque = node.get("x-kubernetes-preserve-unknown-fields", False)
        known = "properties" in node or "additionalProperties" in node
        assert node.get("type") != "object" or known != opaque, path


def test_bounds_are_boolean_beside_a_number() -> None:
    for path, node in NODES.items():
        for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            assert node.get(exclusive, True) is True, path
            assert exclusive not in node or bound in node, path


def test_everything_is_bounded() -> None:
    for path, node in NODES.items():
        if node["type"] == "array" if "type" in node else False:
            assert "maxItems" in node, path
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, path
        if node.get("type") in ("integer", "number") and "enum" not in node:
            assert {"minimum", "maximum"} <= node.keys(), path
            assert node["maximum"] < 2**63, path


def test_every_field_is_described() -> None:
    for path, node in NODES.items():
        if not path.endswith("[]"):
            assert node["description"].strip(), path
            assert node["description"].rstrip()[-1] in ".)", path


@pytest.mark.parametrize("model", sorted(models(), key=lambda model: model.__name__), ids=lambda model: model.__name__)
def test_every_field_has_a_docstring_and_a_stated_default(model: type[BaseModel]) -> None:
    schema = structural_schema(model)
    for name, info in model.model_fields.items():
        assert info.description, name
        field = schema["properties"][info.alias or name]
        assert info.is_required() or info.get_default() is None or "default" in field, name
        assert not info.is_required() or (info.alias or name) in schema["required"], name
        assert info.default_factory is None, name  # pydantic writes no default of a factory into the schema


@pytest.mark.parametrize("model", sorted(models(), key=lambda model: model.__name__), ids=lambda model: model.__name__)
def test_defaults_equal_those_of_the_models(model: type[BaseModel]) -> None:
    schema = structural_schema(model)
    for name, info in model.model_fields.items():
        expected = info.get_default()
        field = schema["properties"][info.alias or name]
        if isinstance(expected, BaseModel):
            expected = expected.model_dump(mode="json", by_alias=True, exclude_none=True)
        filled = with_defaults(field, field["default"]) if "default" in field else None
        assert info.is_required() or filled == expected, name


def test_the_server_and_the_models_fill_in_the_same(job: dict[str, Any]) -> None:
    parsed, found = check_job(job)
    assert parsed is not None, found
    assert with_defaults(SPEC, job["spec"]) == parsed.to_json()["spec"]


def test_names_scope_and_columns() -> None:
    made = crd()
    version = made["spec"]["versions"][0]
    assert made["metadata"]["name"] == "finetunejobs.finetune.dev"
    assert made["spec"]["scope"] == "Namespaced"
    assert made["spec"]["names"]["shortNames"] == ["ftj"]
    assert version["subresources"] == {"status": {}}
    columns = {column["name"]: column["jsonPath"] for column in version["additionalPrinterColumns"]}
    assert list(columns) == ["Phase", "Stage", "Step", "Loss", "ETA", "Attempt", "Age"]
    assert columns["ETA"] == ".status.eta"
    assert ROOT["properties"]["metadata"] == {"type": "object"}


def test_all_of_the_spec_but_the_run_policy_is_immutable() -> None:
    rules = {rule["rule"] for rule in SPEC["x-kubernetes-validations"]}
    for info in FineTuneJobSpec.model_fields.values():
        name = info.alias
        assert (f"self.{name} == oldSelf.{name}" in rules) == (name != "runPolicy")
        assert name in SPEC["required"] or "default" in SPEC["properties"][name], (
            "the rule reads a value that is absent"
        )


def test_the_committed_file_is_what_the_models_make(tmp_path: Path) -> None:
    generate = generator()
    text = generate.rendered()
    assert generate.check(text) == []
    assert len(json.dumps(yaml.safe_load(text), separators=(",", ":"))) < CLIENT_SIDE_APPLY_LIMIT
    stale = tmp_path / "crd.yaml"
    stale.write_text(text.replace("finetunejobs", "other"))
    assert any(line.startswith("+") and "finetunejobs" in line for line in generate.check(text, stale))
    assert generate.check(text, tmp_path / "none.yaml")


@pytest.mark.parametrize(("written", "read"), [({}, "auto"), ({"stallTimeout": None}, 0), ({"stallTimeout": 90}, 90)])
def test_null_switches_the_stall_timeout_off_and_survives_json(written: dict[str, Any], read: Any) -> None:
    """The JSON of a job omits null, so a stored null would be read back as the default."""
    policy = RunPolicy.model_validate(written)
    assert policy.stall_timeout == read
    assert RunPolicy.model_validate(policy.to_json()).stall_timeout == read
    assert NODES["spec.runPolicy.stallTimeout"]["nullable"], "the API server would drop null, and fill in the default"
