"""The teacher's prompts: one template per file `NAME.txt`, each with a version that is recorded in every row."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

VERSIONS = {
    "questions": 1,
    "grounded": 1,
    "evolve-constraints": 1,
    "evolve-deepening": 1,
    "evolve-concretizing": 1,
    "evolve-reasoning": 1,
    "evolve-complicateInput": 1,
    "evolve-breadth": 1,
    "gain": 1,
    "text2sql": 1,
    "text2cypher": 1,
    "query-row": 1,
    "document-row": 1,
    "again": 1,
}
"""Increase a version with every change of the template's text."""


def prompt(name: str, **values: Any) -> str:
    """Return a rendered template. Values are never parsed as templates."""
    return _template(name).render(**values).strip()


def version(name: str) -> str:
    """Return a template's name and version, such as `questions/1`."""
    return f"{name}/{VERSIONS[name]}"


@cache
def _template(name: str) -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(files(__package__).joinpath(f"{name}.txt").read_text("utf-8"))
