"""`merge` and `select-experts`: what is done with trained experts and their scores outside a job."""

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
    result_dir: Annotated[str, typer.Argument(metavar="RESULT_DIR", help="A job, a result or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")],
) -> None:
    """Write an adapter (trained experts, or LoRA) and its base as one model that plain transformers loads."""
    guarded(lambda: _merge(result_dir, out))


def select_command(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.json", help="Scores by layer and expert.")],
    score: Annotated[Literal["token", "gate"], typer.Option(help="Which scores of the file count.")] = "token",
    threshold: Annotated[
        float | None, typer.Option(help="Sum of scores to reach. Default: 0.2 for token, 0.1 for gate.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write. Default: standard output.")] = None,
) -> None:
    """Select experts by scores, as an `esft` stage does, and write them as an `expert_config.json`.

    Reads `expert_scores.json` of a stage and `summary.json` of the ESFT reference code.
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
        raise UserError([Problem("--threshold", f"got {limit:g}, expected more than 0 and at most 1")])
    chosen = select_layers(read_scores(scores, score), limit)
    text = json.dumps(ExpertConfig(chosen, notes={"score": score, "threshold": limit}).to_json())
    if out is None:
        print(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    experts = sum(map(len, chosen.values()))
    print(f"wrote {out}: {experts} experts in {len(chosen)} layers", file=sys.stderr)
