"""The report's facts about a worker's memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune_trainer.report import write_report
from finetune_trainer.report.collect import StageRecord, collect
from finetune_trainer.report.views import memory_facts, panels
from finetune_trainer.storage.filesystem import Storage

GIB = 1 << 30
ON_GPU = {"peak": 40 * GIB, "reserved": 44 * GIB, "context": GIB // 2, "nccl": GIB}


def record(synthetic: ModuleType, root: Path, done: dict[str, Any], **columns: int) -> StageRecord:
    """Return the record of a synthetic sft stage with this memory in its done.json and these columns in its metrics."""
    synthetic.write_run(root)
    stage = root / "stages/02-sft"
    if done:
        (stage / "done.json").write_text(json.dumps(synthetic.done("sft") | {"memory": done}))
    rows = [json.dumps({"step": step, "memory": GIB} | columns) for step in (1, 2)]
    (stage / "metrics.jsonl").write_text("\n".join(rows))
    return next(
        one
        for one in collect(Storage(str(root)), synthetic.layouts(), synthetic.run_config(root)).stages
        if one.layout.title == "sft"
    )


def test_each_holder_has_its_own_line(synthetic: ModuleType, tmp_path: Path) -> None:
    found = record(synthetic, tmp_path, ON_GPU, memory_reserved=2 * GIB)
    assert memory_facts(found) == [
        ("Peak of tensors on the device", "40 GiB"),
        ("Peak reserved by torch", "44 GiB"),
        ("CUDA context", "512 MiB"),
        ("NCCL and later kernels", "1 GiB"),
    ]
    html = Path(write_report(Storage(str(tmp_path)), synthetic.layouts(), synthetic.run_config(tmp_path))).read_text()
    assert "<dt>CUDA context</dt><dd>512 MiB</dd>" in html
    [panel] = [panel for panel in panels(found) if panel.title == "Peak memory"]
    assert list(panel.curves) == ["tensors", "reserved by torch"]


def test_a_stage_under_way_shows_its_last_step(synthetic: ModuleType, tmp_path: Path) -> None:
    columns = {"memory_reserved": 2 * GIB, "memory_context": GIB // 4, "memory_nccl": 0}
    values = dict(memory_facts(record(synthetic, tmp_path, {}, **columns)))
    assert values["Peak reserved by torch"] == "2 GiB" and values["CUDA context"] == "256 MiB"


def test_a_cpu_has_one_figure(synthetic: ModuleType, tmp_path: Path) -> None:
    found = record(synthetic, tmp_path, {"peak": 3 * GIB})
    assert memory_facts(found) == [("Peak memory of the process", "3 GiB")]


@pytest.mark.parametrize("given", [{"peak": "much"}, {"reserved": None, "peak": True}])
def test_values_of_the_wrong_type_are_left_out(given: dict[str, Any], synthetic: ModuleType, tmp_path: Path) -> None:
    assert memory_facts(record(synthetic, tmp_path, given)) == []
