"""Generate the table of values in the chart's README from values.yaml and values.schema.json: `[--check]`."""

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
    """Yield a line of the table for each value that has no nested values.

    Raises:
        KeyError: a value of the schema has no default or no description.
    """
    for name, declared in schema["properties"].items():
        if name == "global":
            continue
        shape = declared | definitions.get(declared.get("$ref", "").rpartition("/")[2], {})
        inner = shape.get("properties", {})
        if inner and all("description" in item for item in inner.values()):
            yield from rows(shape, definitions, values[name], f"{prefix}{name}.")
        else:
            default = json.dumps(values[name], ensure_ascii=False)
            yield f"| `{prefix}{name}` | `{default}` | {declared['description']} |"


def table() -> str:
    """Return the table as Markdown."""
    schema: Json = json.loads((CHART / "values.schema.json").read_text())
    values: Json = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = ["| value | default | description |", "|---|---|---|", *rows(schema, schema["$defs"], values)]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """Return the text of the README with the table replaced."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def main() -> int:
    """Write the README, or with `--check` only compare. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if the table is out of date")
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
