"""Render `report.html` from a run's files in storage, and write it there."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from finetune_api.runconfig import RunConfig
from finetune_trainer.layout import REPORT, StageLayout
from finetune_trainer.progress.formatting import clean
from finetune_trainer.report import views
from finetune_trainer.report.collect import RunRecord, StageRecord, collect
from finetune_trainer.report.evaluation_view import evaluation
from finetune_trainer.report.plots import to_svg
from finetune_trainer.report.synthesis_view import synthesis
from finetune_trainer.storage.filesystem import Storage

TEMPLATE = "report.html.j2"


def write_report(storage: Storage, stages: Sequence[StageLayout], run: RunConfig) -> str:
    """Write `report.html` at the run's root and return its path in the store.

    The file embeds its styles and pictures. The same files in storage give the same bytes. The section of a stage that
    has not run, or of a file that is missing or invalid, is replaced by a note of one line.

    Raises:
        OSError: storage can't be read or written.
    """
    storage.write_text(REPORT, render(collect(storage, stages, run)))
    return storage.path(REPORT)


def render(record: RunRecord) -> str:
    """Return the HTML page of a run."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["clean"] = clean
    return environment.get_template(TEMPLATE).render(
        record=record,
        verdict=views.verdict(record),
        losses=views.final_losses(record),
        stages=[_section(stage, _gates(record, stage)) for stage in record.stages],
        environment=views.environment(record),
        config=clean(yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True, width=100)),
    )


def _gates(record: RunRecord, stage: StageRecord) -> object:
    """Return the gate of an evaluation stage, or None if it has none."""
    try:
        return record.config["job"]["spec"]["stages"][stage.layout.index]["evaluate"]["gate"]
    except (KeyError, IndexError, TypeError):  # not an evaluation, or the configuration is of another version
        return None


def _section(stage: StageRecord, gates: object) -> dict[str, object]:
    measured, made = evaluation(stage, gates), synthesis(stage)
    return {
        "record": stage,
        "transport": views.transport(stage),
        "overview": views.overview(stage),
        "metrics": [] if measured or made else views.final_metrics(stage),
        "memory": views.memory_facts(stage),
        "figures": _figures(stage),
        "data_summary": views.data_summary(stage.data),
        "data": views.data_facts(stage.data),
        "samples": views.samples(stage.samples),
        "evaluation": measured,
        "synthesis": made,
        "experts": views.expert_facts(stage.experts),
        "expert_load": b64encode(stage.expert_load).decode(),
    }


def _figures(stage: StageRecord) -> list[tuple[str, Markup]]:
    panels = views.round_panels(stage) + views.panels(stage)
    # to_svg escapes text from storage, so its result is safe markup.
    return [(panel.title, Markup(to_svg(panel, f"{stage.layout.root}/{panel.title}"))) for panel in panels]


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
