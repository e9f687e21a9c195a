"""Generate the CustomResourceDefinition from the API models: `python crds/generate.py [--check]`.

It writes two files: the plain CRD next to this script, and the template of the Helm chart.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import yaml

from finetune_api.crd import crd

TARGET = Path(__file__).parent / "finetune.dev_finetunejobs.yaml"
CHART_TARGET = Path(__file__).parents[1] / "charts" / "finetune-operator" / "templates" / "crd.yaml"
HEADER = "# Generated from crds/finetune_api by crds/generate.py: change the models, not this file.\n"
DIFF_LINES = 40
CHART_METADATA = """\
  annotations:
    helm.sh/resource-policy: keep
  labels:
    {{- include "finetune-operator.labels" . | nindent 4 }}
"""


def rendered() -> str:
    """Return the CRD as YAML. Keys are sorted, so that the order of fields in the models does not matter."""
    return HEADER + yaml.safe_dump(crd(), sort_keys=True, width=110, allow_unicode=True)


def chart_template(text: str) -> str:
    """Return the CRD as a chart template with the condition `crds.enabled`.

    `helm uninstall` keeps the CRD and all jobs.
    """
    body = text.removeprefix(HEADER).replace("{{", '{{ "{{" }}')
    head, found, rest = body.partition("metadata:\n")
    assert found, "the CRD has no metadata"
    return HEADER + "{{- if .Values.crds.enabled }}\n" + head + found + CHART_METADATA + rest + "{{- end }}\n"


def files() -> dict[Path, str]:
    """Return the content of all generated files by path."""
    text = rendered()
    return {TARGET: text, CHART_TARGET: chart_template(text)}


def check(text: str, target: Path = TARGET) -> list[str]:
    """Return the first lines of the diff between `text` and the file, or an empty list if the bytes are equal."""
    old = target.read_bytes() if target.exists() else b""
    if old == text.encode():
        return []
    lines = difflib.unified_diff(
        old.decode().splitlines(), text.splitlines(), str(target), "the models", lineterm="", n=1
    )
    return list(lines)[:DIFF_LINES] or [f"{target} differs in line endings"]


def main() -> int:
    """Write the files, or with `--check` print how they differ. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if a file is out of date")
    if not parser.parse_args().check:
        for target, text in files().items():
            target.write_bytes(text.encode())
        return 0
    differences = {target: check(text, target) for target, text in files().items()}
    for target, lines in differences.items():
        if lines:
            print(*lines, "", f"{target} is out of date: run `python crds/generate.py`", sep="\n", file=sys.stderr)
    return 1 if any(differences.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
