"""Normalize the tool calls of a message and the schemas of tools.

A call is `{"type": "function", "function": {"name": str, "arguments": dict}}`, with the row's `id`. A schema is
`{"type": "function", "function": {"name": str, "description": str, "parameters": dict}}`. These are OpenAI's formats,
which chat templates read (https://huggingface.co/docs/transformers/chat_extras), except for the arguments: OpenAI has
them as a JSON string, but templates call `tojson` on them, which would encode a string a second time.
"""

from __future__ import annotations

from typing import Any

from finetune_trainer.data.json_values import FormError, kind_name, parse_json, without_nulls

Json = dict[str, Any]
CALL = "expected a call as `{name, arguments}` or `{function: {name, arguments}}`"
SCHEMA = "expected `{type: function, function: {name, description, parameters}}` or the function alone"


def read_calls(message: Json, where: str) -> list[Json]:
    """Return the calls in a message's `tool_calls` or, in OpenAI's older format, `function_call`.

    Raises:
        FormError: they have an unknown format, or their arguments are not an object.
    """
    name = "tool_calls" if message.get("tool_calls") else "function_call"
    return parse_calls(message.get(name), f"{where}.{name}")


def parse_calls(value: Any, where: str) -> list[Json]:
    """Return the calls in a value: one call or a list of calls, as mappings or as JSON strings.

    Raises:
        FormError: see `read_calls`.
    """
    value = _decoded(value, where)
    if not value:
        return []
    if not isinstance(value, list):
        return [_call(value, where)]
    return [_call(item, f"{where}[{index}]") for index, item in enumerate(value) if item is not None]


def _call(value: Any, where: str) -> Json:
    call = _mapping(value, where, CALL)
    function = call if call.get("function") is None else _mapping(call["function"], where, CALL)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise FormError(f"{where} has no `name`: {CALL}")
    arguments = _arguments(function.get("arguments", function.get("parameters")), f"{where}.arguments")
    outside = ("type", "function", *(function if function is call else ()))
    outer = {key: item for key, item in call.items() if key == "id" or key not in outside}
    return {**outer, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: Any, where: str) -> Json:
    """Return the arguments as an object. A string may hold a string if they were encoded twice."""
    value = _decoded(_decoded(value, where), where) if isinstance(value, str) else without_nulls(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormError(f"{where} is {kind_name(value)}, expected an object such as `{{city: Rome}}`, or its JSON")
    return value


def read_tools(value: Any, where: str) -> list[Json]:
    """Return the schemas of a row's tools.

    Args:
        value: a list of schemas or one schema, each a mapping or a JSON string, or the JSON string of any of these. A
            bare function `{name, description, parameters}` is wrapped.

    Raises:
        FormError: the value has an unknown format.
    """
    value = _decoded(value, where)
    if not value:
        return []
    if not isinstance(value, list):
        return [_schema(value, where)]
    return [_schema(item, f"{where}[{index}]") for index, item in enumerate(value) if item is not None]


def _schema(value: Any, where: str) -> Json:
    tool = _mapping(value, where, SCHEMA)
    function = tool.get("function")
    if isinstance(function, str):
        function = _mapping(function, f"{where}.function", SCHEMA)
    if function is None:
        function = {key: item for key, item in tool.items() if key != "type"}
        tool = {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FormError(f"{where} has no `name`: {SCHEMA}")
    return {"type": "function", **tool, "function": _parsed_parameters(function, where)}


def _parsed_parameters(function: Json, where: str) -> Json:
    """Return the function with its `parameters` as a JSON schema, which tables may store as a string."""
    if isinstance(function.get("parameters"), str):
        parameters = _mapping(function["parameters"], f"{where}.parameters", SCHEMA)
        return {**function, "parameters": parameters}
    return function


def _mapping(value: Any, where: str, expected: str) -> Json:
    """Return a mapping, parsed if it is a JSON string, without the nulls that Arrow adds."""
    value = parse_json(value, where) if isinstance(value, str) else without_nulls(value)
    if not isinstance(value, dict):
        raise FormError(f"{where} is {kind_name(value)}: {expected}")
    return value


def _decoded(value: Any, where: str) -> Any:
    """Return the value of a JSON string (None for an empty one), or any other value unchanged."""
    if not isinstance(value, str):
        return value
    return parse_json(value, where) if value.strip() else None
