"""Writes the CustomResourceDefinition from the models: `python crds/generate.py [--check]`."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import yaml

from finetune_api.crd import crd

TARGET = Path(__file__).parent / "finetune.dev_finetunejobs.yaml"
HEADER = "# Generated from crds/finetune_api by crds/generate.py: change the models, not this file.\n"
DIFF_LINES = 40


def rendered() -> str:
    """The CRD as YAML; keys are sorted, so that the order of fields in the models makes no difference."""
    return HEADER + yaml.safe_dump(crd(), sort_keys=True, width=110, allow_unicode=True)


def check(text: str, target: Path = TARGET) -> list[str]:
    """The first lines of the difference between `text` and the file, empty where their bytes are equal."""
    old = target.read_bytes() if target.exists() else b""
    if old == text.encode():
        return []
    lines = difflib.unified_diff(
        old.decode().splitlines(), text.splitlines(), str(target), "the models", lineterm="", n=1
    )
    return list(lines)[:DIFF_LINES] or [f"{target} differs in line endings"]


def main() -> int:
    """Write the file, or with `--check` say how it differs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 where the file is out of date")
    if not parser.parse_args().check:
        TARGET.write_bytes(rendered().encode())
        return 0
    difference = check(rendered())
    if difference:
        print(*difference, "", f"{TARGET} is out of date: run `python crds/generate.py`", sep="\n", file=sys.stderr)
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
