"""Training on a stream that is resumed in one process has exactly the losses of an uninterrupted run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage
from transformers import PrinterCallback, TrainerCallback

from finetune_trainer.data import StreamedRows
from finetune_trainer.stages import make_trainer
from finetune_trainer.training.context import ResumePoint, StageContext
from finetune_trainer.training.reset_state import reset_stage_state

Job = dict[str, Any]
STEPS, KEPT = 6, 3
COMMON = {"maxLength": 64, "perDeviceTrainBatchSize": 2, "gradientAccumulationSteps": 2, "learningRate": 1e-3}
STAGES = {
    "sft": {"data": "rows.jsonl", "lora": {"r": 4, "loraDropout": 0.1}, **COMMON},
    "dpo": {"data": "pairs.jsonl", "lora": {"r": 4, "loraDropout": 0.1}, **COMMON},
    "pretrain": {"data": "text.jsonl", "blockSize": 16, "perDeviceTrainBatchSize": 2, "learningRate": 1e-3},
}


class _Keep(TrainerCallback):
    """Saves the stream's position in each checkpoint, like the stage's own callback."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.stage.feed.save(state.global_step, Path(args.output_dir, f"checkpoint-{state.global_step}"))


def _train(context: StageContext, resume: Path | None = None) -> list[tuple[int, float, float]]:
    """Train, and return (step, loss, epoch) of each step."""
    trainer = make_trainer(context)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Keep(trainer))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = [(row["step"], row["loss"], round(row["epoch"], 9)) for row in trainer.state.log_history if "loss" in row]
    reset_stage_state()
    return log


@pytest.mark.parametrize("kind", list(STAGES))
def test_a_resumed_stream_has_the_same_losses(
    kind: str, base_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = "\n".join(f'{{"text": "{number} and {number * 3} make {number * 4}"}}' for number in range(50))
    (tmp_path / "text.jsonl").write_text(texts)
    data = {"sources": [{"file": STAGES[kind]["data"]}], "streaming": True}
    base_job["spec"]["stages"] = [{kind: {**STAGES[kind], "data": data, "maxSteps": STEPS, "saveSteps": KEPT}}]
    undisturbed = _train(open_stage(base_job, tmp_path))
    assert [step for step, *_ in undisturbed] == list(range(1, STEPS + 1))

    context = open_stage(base_job, tmp_path)
    kept = context.output_dir / f"checkpoint-{KEPT}"
    given = _count_rows(monkeypatch)
    resumed = _train(replace(context, resumed=ResumePoint(KEPT, kept)), kept)
    assert resumed == undisturbed
    assert len(given) == (STEPS - KEPT) * context.rows_per_step + 1, "the new steps' rows, and one for TRL to look at"


def _count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each row that any stream yields."""
    given: list[int] = []
    real = StreamedRows.__iter__

    def counted(self: StreamedRows) -> Any:
        for row in real(self):
            given.append(1)
            yield row

    monkeypatch.setattr(StreamedRows, "__iter__", counted)
    return given
