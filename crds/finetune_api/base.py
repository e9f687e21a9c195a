"""Base class of all API models: camelCase in JSON, no unknown fields, strict types, immutable.

The docstring below a field is its description in the CRD.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

Json = dict[str, Any]


class ApiModel(BaseModel):
    """A model in which an unknown field is an error.

    Types are strict, so that a job that is valid here has the types that the API server accepts.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def faults(self) -> Iterator[str]:
        """Yield a message for each violated rule between fields: the CEL rules, checked in Python."""
        return iter(())

    @model_validator(mode="after")
    def _no_faults(self) -> Self:
        if faults := list(self.faults()):
            raise ValueError("; ".join(faults))
        return self

    def to_json(self) -> Json:
        """Return the model as JSON with camelCase names: defaults are included, unset fields are omitted."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(rule: str, message: str) -> Json:
    """Return a CEL validation rule of the CRD, an item of `x-kubernetes-validations`."""
    return {"rule": rule, "message": message}


def exactly_one(*names: str) -> Json:
    """Return the CEL rule that exactly one of these fields is set. A CRD has no discriminated unions."""
    members = ", ".join(f"has(self.{name})" for name in names)
    return cel(f"[{members}].filter(x, x).size() == 1", f"set exactly one of {', '.join(names)}")


def rules(*validations: Json) -> ConfigDict:
    """Return a model config that adds CEL rules to the generated schema."""
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": list(validations)})


def expects(description: str) -> Json:
    """Return a schema extension that describes a pattern for error messages. The CRD does not contain it."""
    return {"expects": description}


def not_exactly_one(model: BaseModel, *names: str) -> Iterator[str]:
    """Yield a message unless exactly one of the fields (camelCase names) is set: `exactly_one`, checked in Python."""
    fields = {info.alias or name: name for name, info in type(model).model_fields.items()}
    present = [name for name in names if getattr(model, fields[name]) is not None]
    if len(present) != 1:
        got = f"got {' and '.join(present)}" if present else "none is set"
        yield f"set exactly one of {', '.join(names)}; {got}"
