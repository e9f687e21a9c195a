"""Convert a graph schema in one of Neo4j's formats to statements that create a small graph with that schema.

Two formats are read: the text that Neo4j's tools give to language models (`Node properties:`, `Relationship
properties:`, `The relationships:`), and their JSON (`node_props`, `rel_props`, `relationships`), also as a Python
literal.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ROWS = 5
"""Number of generated nodes per label."""
KEY = "_key"
"""Name of the key that the engine requires on each label; names with this prefix are hidden."""
_TYPES = {
    "STRING": "STRING",
    "INTEGER": "INT64",
    "FLOAT": "DOUBLE",
    "BOOLEAN": "BOOL",
    "DATE": "DATE",
    "DATE_TIME": "TIMESTAMP",
    "LOCAL_DATE_TIME": "TIMESTAMP",
    "DURATION": "INTERVAL",
    "LIST": "STRING[]",
    "POINT": "STRUCT(longitude DOUBLE, latitude DOUBLE)",
}
_OWNER = re.compile(r"^\s*-\s+\*\*(.+?)\*\*")
_PROPERTY = re.compile(r"^\s*-\s+`(\w[^`:]*?)`?\s*:\s*([A-Z_]+)`?\s*(.*)$")
_LINK = re.compile(r"\(:`?([^`)]+?)`?\)-\[:`?([^`\]]+?)`?\]->\(:`?([^`)]+?)`?\)")
_EXAMPLE = re.compile(r'"((?:""|[^"])*)"|\'([^\']*)\'')
_BOUNDS = re.compile(r"Min: ?([^,]+), ?Max: ?(\S+)")


class SchemaError(ValueError):
    """A text that is not a graph schema; the message says what is missing."""


@dataclass(frozen=True)
class Property:
    """A property with example values."""

    name: str
    type: str
    """Neo4j's name of the type."""
    values: tuple[str, ...] = ()


@dataclass
class GraphSchema:
    """Properties by label and by relationship type, and the labels that relationships connect."""

    nodes: dict[str, list[Property]] = field(default_factory=dict)
    links: dict[str, list[Property]] = field(default_factory=dict)
    ends: list[tuple[str, str, str]] = field(default_factory=list)
    """Start label, type, end label."""


def read_schema(text: str) -> GraphSchema:
    """Return the schema in a text.

    Raises:
        SchemaError: it names no label.
    """
    stripped = text.strip()
    schema = _of_json(_value(stripped)) if stripped.startswith("{") else _of_text(stripped)
    for start, _, end in schema.ends:
        schema.nodes.setdefault(start, [])
        schema.nodes.setdefault(end, [])
    if not schema.nodes:
        raise SchemaError("names no node label: expected `Node properties:` with `- **Label**` lines, or `node_props`")
    return schema


def statements(schema: GraphSchema) -> str:
    """Statements that make the tables, and a few nodes of each label and the links between them."""
    return "\n".join([*_tables(schema), *_rows(schema)])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise SchemaError(f"is neither JSON nor text: {error}") from error


def _of_text(text: str) -> GraphSchema:
    schema = GraphSchema()
    section, owner = schema.nodes, ""
    for line in text.splitlines():
        lower = line.lower()
        if lower.startswith("relationship properties"):
            section, owner = schema.links, ""
        if (named := _OWNER.match(line)) is not None:
            owner = named[1].strip()
            section.setdefault(owner, [])
        elif owner and (found := _PROPERTY.match(line)) is not None:
            section[owner].append(Property(found[1].strip(), found[2], _values(found[3])))
        schema.ends += [(link[1].strip(), link[2].strip(), link[3].strip()) for link in _LINK.finditer(line)]
    return schema


def _values(rest: str) -> tuple[str, ...]:
    bounds = _BOUNDS.search(rest)
    if bounds is not None:
        return bounds[1].strip(), bounds[2].strip()
    return tuple((one or other).replace('""', '"') for one, other in _EXAMPLE.findall(rest))


def _of_json(value: Any) -> GraphSchema:
    if not isinstance(value, dict) or not isinstance(value.get("node_props"), dict):
        raise SchemaError("has no `node_props`, a mapping from label to properties")
    schema = GraphSchema()
    try:
        schema.nodes = {str(name): list(map(_property, found)) for name, found in value["node_props"].items()}
        schema.links = {str(name): list(map(_property, found)) for name, found in value.get("rel_props", {}).items()}
        links = value.get("relationships", [])
        schema.ends = [(str(link["start"]), str(link["type"]), str(link["end"])) for link in links]
    except (KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"is not in the format of Neo4j's structured schema: {error!r}") from error
    return schema


def _property(value: dict[str, Any]) -> Property:
    known = value.get("values") or [value[name] for name in ("min", "max") if name in value]
    return Property(str(value["property"]), str(value["type"]), tuple(map(str, known)))


def _tables(schema: GraphSchema) -> Iterator[str]:
    for label, properties in schema.nodes.items():
        columns = [f"{_name(KEY)} SERIAL", *map(_column, _distinct(properties)), f"PRIMARY KEY ({_name(KEY)})"]
        yield f"CREATE NODE TABLE {_name(label)} ({', '.join(columns)});"
    for kind in dict.fromkeys(kind for _, kind, _ in schema.ends):
        ends = dict.fromkeys((start, end) for start, named, end in schema.ends if named == kind)
        columns = [f"FROM {_name(start)} TO {_name(end)}" for start, end in ends]
        columns += map(_column, _distinct(schema.links.get(kind, [])))
        yield f"CREATE REL TABLE {_name(kind)} ({', '.join(columns)});"


def _rows(schema: GraphSchema) -> Iterator[str]:
    for label, properties in schema.nodes.items():
        for number in range(ROWS):
            yield f"CREATE (:{_name(label)} {_example_values(_distinct(properties), number)});"
    for start, kind, end in dict.fromkeys(schema.ends):
        for number in range(ROWS):
            other = (number + 1) % ROWS
            values = _example_values(_distinct(schema.links.get(kind, [])), number)
            yield (
                f"MATCH (a:{_name(start)}), (b:{_name(end)}) WHERE a.{_name(KEY)} = {number} AND "
                f"b.{_name(KEY)} = {other} CREATE (a)-[:{_name(kind)} {values}]->(b);"
            )


def _distinct(properties: list[Property]) -> list[Property]:
    """Return each name once: the engine's names are case-insensitive."""
    return list({one.name.casefold(): one for one in reversed(properties)}.values())[::-1]


def _column(one: Property) -> str:
    return f"{_name(one.name)} {_TYPES.get(one.type, 'STRING')}"


def _example_values(properties: list[Property], number: int) -> str:
    values = [(one.name, _literal(one, number)) for one in properties]
    return "{" + ", ".join(f"{_name(name)}: {value}" for name, value in values if value is not None) + "}"


def _literal(one: Property, number: int) -> str | None:
    """Return a value of a property for the node with that number, from the schema's examples if it has some."""
    example = one.values[number % len(one.values)] if one.values else None
    match _TYPES.get(one.type, "STRING"):
        case "STRING":
            return _text(example if example is not None else f"{one.name} {number}")
        case "INT64" | "DOUBLE" as kind:
            return _number(example, number, whole=kind == "INT64")
        case "BOOL":
            return "true" if number % 2 else "false"
        case "DATE":
            return f"date({_text(_day(example, number))})"
        case "TIMESTAMP":
            return f"timestamp({_text(_day(example, number) + ' 12:00:00')})"
        case "STRING[]":
            return f"[{_text(f'{one.name} {number}')}]"
        case _:
            return None


def _number(example: str | None, number: int, *, whole: bool) -> str:
    try:
        value = float(example) if example is not None else float(number)
    except ValueError:
        value = float(number)
    value = value if abs(value) < 2**53 else float(number)
    return str(int(value)) if whole else repr(value)


def _day(example: str | None, number: int) -> str:
    found = re.match(r"\d{4}-\d{2}-\d{2}", example or "")
    return found[0] if found else f"20{10 + number}-01-15"


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + " ".join(escaped.split()) + "'"


def _name(name: str) -> str:
    return "`" + name.replace("`", "") + "`"
