"""Only the module of an engine names it, so that a new engine changes no other module of the product."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from finetune_api.kubernetes import Kubernetes
from finetune_operator.engines import ENGINES
from finetune_operator.engines.registry import AUTO

ROOT = Path(__file__).parents[2]
ENGINES_FOLDER = ROOT / "operator" / "finetune_operator" / "engines"
NODE_ROLE = ROOT / "trainer" / "finetune_trainer" / "launch" / "node_role.py"
"""The trainer's module that reads the environment variables that engines set in their pods."""
COMMON_WORDS = {"job", "jobs", "batch"}
"""Names of the engine `job` that also mean a FineTuneJob; the test searches them only as values in code."""
EVERYWHERE = ("operator", "cli")
WORDS = {word for engine in ENGINES.values() for word in (engine.name, engine.kind, engine.plural, engine.group)}
KINDS = [engine.kind for engine in ENGINES.values()] + ["RayCluster", "Indexed"]
DISTINCT = re.compile("|".join(map(re.escape, WORDS - COMMON_WORDS - set(KINDS))), re.IGNORECASE)
KIND = re.compile(r"\b(" + "|".join(KINDS) + r")\b")


def modules(*packages: str) -> list[Path]:
    """Yield the Python files of packages, without those where engines may be named."""
    found = (path for package in packages for path in (ROOT / package).rglob("*.py"))
    return sorted(path for path in found if not path.is_relative_to(ENGINES_FOLDER) and path != NODE_ROLE)


def named_in_text(source: str) -> list[str]:
    """Return the lines (code, comments, docstrings) that name an engine, its kind, plural or API group."""
    return [line.strip() for line in source.splitlines() if DISTINCT.search(line) or KIND.search(line)]


def named_in_code(source: str) -> list[str]:
    """Return the string constants that name an engine, without keys of mappings such as `job` of a RunConfig."""
    tree = ast.parse(source)
    skipped = {id(node) for node in _keys_and_docstrings(tree)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in skipped)
    return [node.value for node in constants if isinstance(node.value, str) and _names_an_engine(node.value)]


def _names_an_engine(text: str) -> bool:
    return text in WORDS or bool(DISTINCT.search(text)) or text in KINDS


def _keys_and_docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Expr):
            yield node.value


@pytest.mark.parametrize("path", modules(*EVERYWHERE), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_its_own_module_names_an_engine(path: Path) -> None:
    assert named_in_text(path.read_text()) == []


def test_code_compares_no_engine_by_name() -> None:
    operator = {str(path): named_in_code(path.read_text()) for path in modules("operator")}
    assert {path: names for path, names in operator.items() if names} == {}
    others = {str(path): [name for name in named_in_code(path.read_text()) if name not in COMMON_WORDS]
              for path in modules("cli", "trainer")}  # fmt: skip
    assert {path: names for path, names in others.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        'kinds = {"jobs": "Job"}',
        'if engine.name == "kuberay": pass',
        'def f(engine="job"): pass',
        'path = "/apis/ray.io/v1"',
        'return_kind = owner.get("kind") == "RayCluster"',
        'found = ENGINES.get("job")',
    ],
)
def test_the_search_finds(source: str) -> None:
    assert named_in_code(source)


def test_the_search_finds_text() -> None:
    assert named_in_text("def _for_kuberay(run):") and named_in_text("# a run's Job or RayJob")
    assert not named_in_text("# a FineTuneJob and the jobs of a queue")


def test_the_api_offers_the_registered_engines() -> None:
    """The values of `kubernetes.engine` are exactly the registered engines; no other part of the API names them."""
    offered = get_args(Kubernetes.model_fields["engine"].annotation)
    assert set(offered) - {AUTO} == set(ENGINES)
    assert [engine.name for engine in ENGINES.values() if engine.runs_helpers] == ["job"]
