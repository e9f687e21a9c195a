"""Custom code of models and tokenizers never runs, and no library call asks about it on standard input."""

from __future__ import annotations

import ast
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.model.saved_models import configure

from finetune_trainer.errors import UserError
from finetune_trainer.model.config import load_tokenizer, read_config
from finetune_trainer.model.source import ModelSource

SOURCES = Path(__file__).parents[2]
READS = {"from_pretrained", "from_config", "load_dataset", "HFLM"}
"""Calls that could run custom code of a model, tokenizer, dataset or task."""
RUNS_NONE = {"GenerationConfig", "PeftConfig", "AutoHfQuantizer"}
"""Classes whose methods of these names read only JSON."""


def reading_calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
        if name in READS and owner not in RUNS_NONE:
            yield node


def refuses_code(call: ast.Call) -> bool:
    given = [keyword.value for keyword in call.keywords if keyword.arg == "trust_remote_code"]
    return any(isinstance(value, ast.Constant) and value.value is False for value in given)


@pytest.mark.parametrize("package", ["trainer", "cli", "operator", "crds"])
def test_every_call_refuses_custom_code(package: str) -> None:
    calls = [(path, call) for path in (SOURCES / package).rglob("*.py") for call in reading_calls(path)]
    lenient = [f"{path}:{call.lineno}" for path, call in calls if not refuses_code(call)]
    assert not lenient, "pass trust_remote_code=False"
    assert package != "trainer" or len(calls) >= 7


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that custom code writes when it runs, with `y` answers on standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return tmp_path / "ran"


def with_code(source: Path, target: Path, ran: Path) -> Path:
    """Save a model whose architecture and tokenizer are code in its directory."""
    shutil.copytree(source, target)
    effect = f"open({str(ran)!r}, 'w').close()\n"
    base = "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
    classes = (
        "class MyConfig(PretrainedConfig):\n    model_type = 'mine'\n"
        "class MyModel(PreTrainedModel):\n    config_class = MyConfig\n"
        "class MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (target / "mine.py").write_text(effect + base + classes)
    return target


def assert_untouched(ran: Path) -> None:
    assert not ran.exists(), "custom code ran"
    assert sys.stdin.read() == "y\n" * 9, "standard input was read"


def test_an_architecture_in_code_is_refused_by_its_auto_map(llama_dir: Path, tmp_path: Path, ran: Path) -> None:
    directory = with_code(llama_dir, tmp_path / "custom", ran)
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    configure(directory, model_type="mine", auto_map=auto_map, architectures=["MyModel"])
    with pytest.raises(UserError) as error:
        read_config(str(directory))
    message = str(error.value)
    assert "auto_map: AutoConfig: mine.MyConfig, AutoModelForCausalLM: mine.MyModel" in message
    assert "never run" in message and "convert it to an architecture that transformers supports" in message
    load_tokenizer(ModelSource(str(directory), None, None, str(directory)))  # this needs no custom code
    assert_untouched(ran)


def test_a_tokenizer_in_code_is_refused(llama_dir: Path, tmp_path: Path, ran: Path) -> None:
    directory = with_code(llama_dir, tmp_path / "custom", ran)
    fields = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MyTokenizer"]}}
    configure(directory, "tokenizer_config.json", **fields)
    configure(directory, model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    with pytest.raises(UserError, match=r"auto_map: AutoTokenizer: mine\.MyTokenizer"):
        load_tokenizer(ModelSource(str(directory), None, None, str(directory)))
    assert_untouched(ran)


def test_a_native_architecture_with_code_beside_it_loads_without_the_code(
    llama_dir: Path, tmp_path: Path, ran: Path
) -> None:
    from finetune_trainer.model.load import load_whole

    directory = with_code(llama_dir, tmp_path / "custom", ran)
    configure(directory, auto_map={"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"})
    assert type(load_whole(str(directory), dtype="auto")).__name__ == "LlamaForCausalLM"
    load_tokenizer(ModelSource(str(directory), None, None, str(directory)))
    assert_untouched(ran)
