"""Writes the table of values in the chart's README from values.yaml and values.schema.json: `[--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
CHART = Path(__file__).parent / "finetune-operator"
README = CHART / "README.md"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->\n"


def rows(schema: Json, definitions: Json, values: Json, prefix: str = "") -> Iterator[str]:
    """A line of the table for each value that has no values of its own.

    Raises:
        KeyError: the schema has a value without a default or a description.
    """
    for name, found in schema["properties"].items():
        if name == "global":
            continue
        shape = found | definitions.get(found.get("$ref", "").rpartition("/")[2], {})
        inner = shape.get("properties", {})
        if inner and all("description" in item for item in inner.values()):
            yield from rows(shape, definitions, values[name], f"{prefix}{name}.")
        else:
            default = json.dumps(values[name], ensure_ascii=False)
            yield f"| `{prefix}{name}` | `{default}` | {found['description']} |"


def table() -> str:
    schema: Json = json.loads((CHART / "values.schema.json").read_text())
    values: Json = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = ["| value | default | |", "|---|---|---|", *rows(schema, schema["$defs"], values)]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with the table between its two marks."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def main() -> int:
    """Write the README, or with `--check` say whether it is out of date; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 where the table is out of date")
    old = README.read_text()
    new = with_table(old)
    if not parser.parse_args().check:
        README.write_text(new)
        return 0
    if old != new:
        print(f"{README} is out of date: run `python charts/values_table.py`", file=sys.stderr)
    return int(old != new)


if __name__ == "__main__":
    sys.exit(main())
