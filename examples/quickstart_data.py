"""Generate training data from the docstrings of Python: `python quickstart_data.py [DIRECTORY]`.

It writes four JSON Lines files, which are always the same for one Python version:

- `corpus.jsonl`: `{text}`, docstrings of the standard library and the language reference, for pretraining;
- `questions.jsonl`: `{messages}`, "What does `str.join` do?" with the first sentence of the docstring;
- `held-out.jsonl`: the same functions with other wordings of the questions;
- `preferences.jsonl`: `{prompt, chosen, rejected}`; the rejected sentence is that of another function, or truncated.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]
Docs = dict[str, str]

CORPUS_MODULES = (
    "builtins", "bisect", "collections", "copy", "datetime", "fnmatch", "functools", "glob", "heapq", "itertools",
    "json", "math", "operator", "os", "os.path", "random", "re", "shutil", "statistics", "string", "textwrap", "time",
)  # fmt: skip
"""Modules without side effects at import."""

QUESTION_MODULES = ("builtins",)
"""Modules with the functions of the questions: few enough for a tiny model to learn all of them."""

QUESTION_TYPES = (str, list)
"""Built-in types whose methods are also used for questions."""

WORDINGS = (
    "What does `{name}` do?",
    "What does {name} do?",
    "What is {name} for?",
    "What is `{name}` good for?",
    "Explain {name}.",
    "Explain `{name}` to me.",
    "Tell me about `{name}`.",
    "Describe {name} in one sentence.",
)
"""Wordings of the questions. For each function one of them is held out, in rotation."""

UNSEEN_WORDING = "I met {name} in some code. What does it do?"
"""Wording that is held out for all functions."""

MIN_ANSWER, MAX_ANSWER = 15, 90
_ABBREVIATIONS = ("e.g.", "eg.", "i.e.", "a.k.a.", "etc.")
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)(\s*->.*)?$")


def main() -> None:
    """Write the files and print their numbers of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "quickstart-data"
    parser.add_argument("directory", nargs="?", type=Path, default=default, help=f"default: {default}")
    directory = parser.parse_args().directory
    for name, count in write(directory).items():
        print(f"{directory / name}: {count} rows")


def write(directory: Path) -> dict[str, int]:
    """Write all files to `directory` and return the number of rows by file name."""
    directory.mkdir(parents=True, exist_ok=True)
    # Keep the generated files out of the repository.
    (directory / ".gitignore").write_text("*\n")
    tables = build()
    for name, rows in tables.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / name).write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in tables.items()}


def build() -> dict[str, list[Row]]:
    """Return the rows of each file.

    Raises:
        SystemExit: Python runs without docstrings (`-OO`).
    """
    if sys.flags.optimize > 1:
        raise SystemExit("quickstart_data.py reads docstrings, which `python -OO` strips: run it without -OO")
    answers = question_answers()
    return {
        "corpus.jsonl": [{"text": text} for text in corpus()],
        "questions.jsonl": [_conversation(*pair) for pair in questions(answers)],
        "held-out.jsonl": [_conversation(*pair) for pair in held_out(answers)],
        "preferences.jsonl": list(preferences(answers)),
    }


def corpus() -> list[str]:
    """Return the docstrings, each with its name, and the language reference, without duplicates."""
    documents = [f"{name}\n\n{doc}" for module in CORPUS_MODULES for name, doc in _docs(module).items()]
    topics: Docs = importlib.import_module("pydoc_data.topics").topics
    return list(dict.fromkeys(documents + [topics[name].strip() for name in sorted(topics)]))


def question_answers() -> Docs:
    """Return the first sentence of the docstring by function name, without duplicate sentences."""
    docs: Docs = {}
    for module in QUESTION_MODULES:
        docs |= _function_docs(importlib.import_module(module), _prefix(module))
    for kind in QUESTION_TYPES:
        docs |= _function_docs(kind, f"{kind.__name__}.")
    answers: Docs = {}
    for name, doc in docs.items():
        sentence = first_sentence(doc)
        if MIN_ANSWER <= len(sentence) <= MAX_ANSWER and sentence not in answers.values():
            answers[name] = sentence
    return answers


def first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring without signature lines, or an empty string."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", doc)]
    prose = next((part for part in paragraphs if not _SIGNATURE.match(part)), "")
    sentence = re.split(r"(?<=[.!?])\s", prose, maxsplit=1)[0]
    return sentence if sentence.endswith(".") and not sentence.endswith(_ABBREVIATIONS) else ""


def questions(answers: Docs) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) for every function in all wordings except its held-out one."""
    for index, (name, answer) in enumerate(answers.items()):
        for number, wording in enumerate(WORDINGS):
            if number != index % len(WORDINGS):
                yield wording.format(name=name), answer


def held_out(answers: Docs) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) for every function in its held-out wording and in the unseen wording."""
    for index, (name, answer) in enumerate(answers.items()):
        yield WORDINGS[index % len(WORDINGS)].format(name=name), answer
        yield UNSEEN_WORDING.format(name=name), answer


def preferences(answers: Docs, seed: int = 0) -> Iterator[Row]:
    """Yield about two pairs per function: the rejected answer is that of another function, or a truncated one."""
    chance = random.Random(seed)
    sentences = list(answers.values())
    for question, answer in questions(answers):
        if chance.random() < 2 / (len(WORDINGS) - 1):
            other = chance.choice([sentence for sentence in sentences if sentence != answer])
            rejected = other if chance.random() < 0.5 else _cut(answer)
            yield {"prompt": [_turn("user", question)], "chosen": [_turn("assistant", answer)],
                   "rejected": [_turn("assistant", rejected)]}  # fmt: skip


def _cut(answer: str) -> str:
    words = answer.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _conversation(question: str, answer: str) -> Row:
    return {"messages": [_turn("user", question), _turn("assistant", answer)]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _prefix(module: str) -> str:
    return "" if module == "builtins" else f"{module}."


def _docs(module_name: str) -> Docs:
    """Return the docstrings of a module, its functions, its classes and their methods, by full name."""
    module = importlib.import_module(module_name)
    prefix = _prefix(module_name)
    docs = {module_name: inspect.getdoc(module) or ""} | _function_docs(module, prefix)
    for name, kind in _public(module):
        if inspect.isclass(kind) and _defined_in(kind, module):
            docs[prefix + name] = inspect.getdoc(kind) or ""
            docs |= _function_docs(kind, f"{prefix}{name}.")
    return {name: doc for name, doc in docs.items() if doc}


def _function_docs(owner: ModuleType | type, prefix: str) -> Docs:
    found = ((name, value) for name, value in _public(owner) if inspect.isroutine(value))
    return {prefix + name: doc for name, value in found if (doc := value.__doc__ and inspect.getdoc(value))}


def _public(owner: ModuleType | type) -> Iterable[tuple[str, Any]]:
    """Return the public members by name: those that a class defines, or those in `__all__` of a module."""
    exported = getattr(owner, "__all__", None) or vars(owner)
    return [(name, getattr(owner, name, None)) for name in sorted(exported) if not name.startswith("_")]


def _defined_in(kind: type, module: ModuleType) -> bool:
    return kind.__module__ in (module.__name__, f"_{module.__name__}")


if __name__ == "__main__":
    main()
