"""The base every API model shares: camelCase on the wire, closed, strict and immutable.

A docstring under a field is its description, in Python and in the CRD alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel

Json = dict[str, Any]


class ApiModel(BaseModel):
    """A closed model: an unknown field is an error, never ignored.

    Strict, so that a job accepted here has the types that the API server accepts.
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
        """What is wrong between this object's fields, one message each: the Python twins of its CEL rules."""
        return iter(())

    @model_validator(mode="after")
    def _no_faults(self) -> Self:
        if faults := list(self.faults()):
            raise ValueError("; ".join(faults))
        return self

    def to_json(self) -> Json:
        """The model as JSON values under its wire names: every default written out, what is unset left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(rule: str, message: str) -> Json:
    """One CEL validation rule of the CRD, in `x-kubernetes-validations` form."""
    return {"rule": rule, "message": message}


def exactly_one(*names: str) -> Json:
    """The CEL rule «exactly one of these member fields is set» (no discriminated unions in a CRD)."""
    members = ", ".join(f"has(self.{name})" for name in names)
    return cel(f"[{members}].filter(x, x).size() == 1", f"set exactly one of {', '.join(names)}")


def rules(*validations: Json) -> ConfigDict:
    """A model config that carries CEL rules into the generated schema."""
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": list(validations)})


def expects(words: str) -> Json:
    """What a pattern expects, in plain words for messages; the CRD leaves it out."""
    return {"expects": words}


def not_exactly_one(model: BaseModel, *names: str) -> Iterator[str]:
    """The Python twin of `exactly_one`: a message where none or several of the members (wire names) are set."""
    fields = {info.alias or name: name for name, info in type(model).model_fields.items()}
    given = [name for name in names if getattr(model, fields[name]) is not None]
    if len(given) != 1:
        got = f"got {' and '.join(given)}" if given else "none is set"
        yield f"set exactly one of {', '.join(names)}; {got}"
