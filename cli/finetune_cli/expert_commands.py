"""The commands for adapters and expert scores: `merge` and `select-experts`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune_cli.outcome import guarded


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("merge")(merge_command)
    app.command("select-experts")(select_command)


def merge_command(
    result_dir: Annotated[
        str, typer.Argument(metavar="RESULT_DIR", help="Directory of a job, a result or an adapter.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory. It must not exist.")],
) -> None:
    """Merge an adapter (LoRA or trained experts) into its base model and write a model that transformers can load."""
    guarded(lambda: _merge(result_dir, out))


def select_command(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.json", help="Scores per layer and expert.")],
    score: Annotated[Literal["token", "gate"], typer.Option(help="Score of the file to use.")] = "token",
    threshold: Annotated[
        float | None, typer.Option(help="Sum of scores to reach. Default: 0.2 for token, 0.1 for gate.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file. Default: standard output.")] = None,
) -> None:
    """Select experts by their scores, as an `esft` stage does, and write an `expert_config.json`.

    The input is `expert_scores.json` of a stage or `summary.json` of the ESFT reference code.
    """
    guarded(lambda: _select(scores, score, threshold, out))


def _merge(result_dir: str, out: Path) -> None:
    from finetune_trainer.generation.merge import merge

    merge(result_dir, out)
    print(f"wrote {out}")


def _select(scores: Path, score: Literal["token", "gate"], threshold: float | None, out: Path | None) -> None:
    from finetune_api.problems import Problem
    from finetune_api.stages import default_threshold
    from finetune_trainer.errors import UserError
    from finetune_trainer.esft.selection import ExpertConfig, read_scores, select_layers

    limit = default_threshold(score) if threshold is None else threshold
    if not 0 < limit <= 1:
        raise UserError([Problem("--threshold", f"got {limit:g}, expected a number above 0 and up to 1")])
    selected = select_layers(read_scores(scores, score), limit)
    text = json.dumps(ExpertConfig(selected, notes={"score": score, "threshold": limit}).to_json())
    if out is None:
        print(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    experts = sum(map(len, selected.values()))
    print(f"wrote {out}: {experts} experts in {len(selected)} layers", file=sys.stderr)
