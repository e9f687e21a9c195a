"""Validation of a job file: report all faults at once, with the names in the file.

There are three passes, so that no fault hides another: unknown fields by the schema (a misspelled one is then treated
as the field that it most likely means), values by pydantic, and rules between fields on the valid part of the job.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from finetune_api.base import ApiModel, Json
from finetune_api.crd import structural_schema
from finetune_api.job import FineTuneJob
from finetune_api.messages import Loc, expected, field_path, first_sentence, mismatch, object_path, shown
from finetune_api.problems import Problem, did_you_mean, nearest

SERVER_METADATA = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)
"""Metadata fields that the API server sets. They are ignored, so that a job exported from a cluster is valid."""

_PARTS = "a mapping with apiVersion, kind, metadata and spec"


@dataclass(frozen=True)
class _Fault:
    loc: Loc
    message: str
    path_in_message: bool = False

    def problem(self) -> Problem:
        path = "" if self.path_in_message else field_path(self.loc) or "".join(map(str, self.loc))
        return Problem(path, self.message)


def check_job(data: object) -> tuple[FineTuneJob | None, list[Problem]]:
    """Return the job in `data` (parsed YAML or JSON) if it is valid, and all problems in the order of the document.

    Does not raise: a problem describes any invalid value of `data`.
    """
    if not isinstance(data, dict) or not data:
        fault = "the job is empty:" if data is None or data == {} else f"got {shown(data)},"
        return None, [Problem("", f"{fault} expected {_PARTS}")]
    document, faults = _with_known_names(data, structural_schema(FineTuneJob), ())
    assert isinstance(document, dict)
    try:
        job = FineTuneJob.model_validate(document)
    except ValidationError as error:
        wrong = _wrong_values(error)
        _, broken = _unvalidated(FineTuneJob, document, (), frozenset(fault.loc for fault in wrong))
        job, faults = None, faults + wrong + broken
    faults.sort(key=lambda fault: _position(document, fault.loc))
    return (None if faults else job), list(dict.fromkeys(fault.problem() for fault in faults))


def _with_known_names(value: object, schema: Json, loc: Loc) -> tuple[object, list[_Fault]]:
    """Return a copy in which misspelled fields have the name that they most likely mean, and the faults."""
    faults: list[_Fault] = []
    if isinstance(value, list) and "items" in schema:
        items = [_with_known_names(item, schema["items"], (*loc, index)) for index, item in enumerate(value)]
        return [item for item, _ in items], [fault for _, more in items for fault in more]
    if not isinstance(value, dict) or "properties" not in schema:
        return value, faults
    known: Json = schema["properties"]
    result: Json = {}
    for key, item in value.items():
        if loc == ("metadata",) and key in SERVER_METADATA:
            continue
        name, message = (key, None) if key in known else _renamed(key, known, {*value, *result}, object_path(loc))
        if message is not None:
            faults.append(_Fault((*loc, name), message, path_in_message=True))
        result[name], more = _with_known_names(item, known.get(name, {}), (*loc, name))
        faults += more
    return result, faults


def _renamed(key: object, known: Json, taken: set[Any], where: str) -> tuple[str, str]:
    """Return the name to treat an unknown key as, and the message about the key."""
    name = key if isinstance(key, str) else shown(key)
    written = name if len(name) <= 80 else f"{name[:80]}..."
    close = nearest(name, known)
    message = f"unknown field `{written}` in {where}{did_you_mean(name, known)}"
    return close if close is not None and close not in taken else name, message


def _wrong_values(error: ValidationError) -> list[_Fault]:
    """Return the faults of single values. Other passes find unknown names and violated rules."""
    schema = structural_schema(FineTuneJob)
    faults = []
    for item in error.errors(include_url=False, include_context=False):
        if item["type"] in ("value_error", "extra_forbidden"):
            continue
        loc = item["loc"]
        if loc[-1] == "[key]":
            faults.append(_Fault(loc[:-2], f"got the name {shown(item['input'])}, expected text: put it in quotes"))
            continue
        field = _schema_at(schema, loc)
        faults.append(_Fault(loc, _required(field) if item["type"] == "missing" else mismatch(item["input"], field)))
    return faults


def _required(field: Json) -> str:
    fixed = f" Write {expected(field)}." if len(field.get("enum", ())) == 1 else ""
    return f"is required: {first_sentence(field.get('description', ''))}{fixed}"


def _schema_at(schema: Json, loc: Loc) -> Json:
    for part in loc:
        inner = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        schema = inner or schema.get("additionalProperties") or {}
    return schema


def _unvalidated(
    model: type[BaseModel], value: Json, loc: Loc, wrong: frozenset[Loc]
) -> tuple[BaseModel, list[_Fault]]:
    """Build an object from the valid parts of `value`; return it and the violated rules in it and below it."""
    fields: Json = {}
    faults: list[_Fault] = []
    for name, info in model.model_fields.items():
        alias = info.alias or name
        content, more = _content(info, value.get(alias), (*loc, alias), wrong)
        faults += more
        if content is not None:
            fields[alias] = content
    instance = model.model_construct(**fields)
    broken_rules = [_Fault(loc, message, path_in_message=loc == ("spec",)) for message in _messages(instance)]
    return instance, broken_rules + faults


def _content(info: FieldInfo, value: object, at: Loc, wrong: frozenset[Loc]) -> tuple[object, list[_Fault]]:
    """Return the value of one field for the rules, and faults below it. None selects the default of the field.

    An invalid value of a field without a default is kept, so that no rule reports the field as unset.
    """
    model = _model_in(info.annotation)
    if model is not None and isinstance(value, dict):
        return _unvalidated(model, value, at, wrong)
    if model is not None and isinstance(value, list):
        items = [_unvalidated(model, item, (*at, i), wrong) for i, item in enumerate(value) if isinstance(item, dict)]
        return [item for item, _ in items], [fault for _, more in items for fault in more]
    if info.is_required() and model is not None:
        return ([] if typing.get_origin(info.annotation) is list else model.model_construct()), []
    return (None if at in wrong and info.get_default() is not None else value), []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model class in a type such as `Lora | None` or `list[Stage]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _messages(instance: BaseModel) -> list[str]:
    """Return the messages of the violated rules of an object. Rules that fail on an invalid value are skipped."""
    messages: list[str] = []
    if isinstance(instance, ApiModel):
        try:
            for message in instance.faults():
                messages.append(message)
        except (AttributeError, TypeError, ValueError):
            return messages
    return messages


def _position(document: object, loc: Loc) -> tuple[int, ...]:
    """Return a sort key for the position of a location in the document. Missing fields come after their siblings."""
    position = []
    for part in loc:
        if isinstance(document, dict):
            keys = list(document)
            position.append(keys.index(part) if part in document else len(keys))
            document = document.get(part)
        elif isinstance(document, list) and isinstance(part, int):
            position.append(part)
            document = document[part] if part < len(document) else None
    return tuple(position)
