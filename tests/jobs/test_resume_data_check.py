"""A stage resumes only with the training rows of its checkpoint, unless `--set` overrides its data."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs.in_process import open_stage
from support.jobs.tiny_rows import dialogue
from transformers import AutoTokenizer

from finetune_api.runconfig import RunConfig
from finetune_cli.jobfile import read_job, run_config
from finetune_trainer.errors import UserError
from finetune_trainer.launch.preparation import Preparation
from finetune_trainer.launch.resume import open_run
from finetune_trainer.launch.same_data import Comparison, compare_data
from finetune_trainer.plan.workers import plan_workers
from finetune_trainer.stage_graph import layouts
from finetune_trainer.storage.checkpoints import CheckpointStore, Manifest
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.training.context import StageContext

Job = dict[str, Any]
Write = Callable[[Job], Path]
ROWS = [dialogue(f"{a} plus {a}", f"makes {a + a}") for a in range(12)]
OTHER = [dialogue(f"{a} plus {a}", f"makes {a + a + 1}") for a in range(12)]
SHORT = {"generation": {"maxNewTokens": 8}}
FIELD = "stages[0].sft.data"
PAIRS = [{"prompt": f"{a} plus 1", "chosen": f" makes {a + 1}", "rejected": f" makes {a + 3}"} for a in range(10)]


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def saved(context: StageContext) -> Manifest:
    """Return the manifest of a checkpoint that was trained on the context's data."""
    key = json.loads(json.dumps(asdict(context.data.key)))
    return Manifest(100, 1, 0, 8, 1, {"x": 1}, 0.0, key)


def compare(manifest: Manifest, context: StageContext, *overrides: str) -> Comparison:
    run = context.run.model_copy(update={"overrides": list(overrides)})
    return compare_data(run, 0, manifest, context.data.key)


def refusal(manifest: Manifest, context: StageContext, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        compare(manifest, context, *overrides)
    return str(error.value)


@pytest.fixture
def sft(base_job: Job) -> Job:
    stage: Job = base_job["spec"]["stages"][0]["sft"]
    return stage


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_rows_elsewhere_are_the_same_data(
    streaming: bool, base_job: Job, sft: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows may be moved, renamed, rewritten or prepared elsewhere and, unless streamed, in another format."""
    sft["data"]["streaming"] = streaming
    before = saved(open_stage(base_job, tmp_path))
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "renamed.jsonl")
    sft["data"]["sources"] = [{"file": "renamed.jsonl"}]
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    assert compare(before, open_stage(base_job, tmp_path)) == Comparison(False, [])
    if not streaming:
        sft["data"]["sources"] = [{"inline": ROWS}]
        assert compare(before, open_stage(base_job, tmp_path)) == Comparison(False, [])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_other_rows_are_refused_unless_they_are_named(
    streaming: bool, packing: bool, base_job: Job, sft: Job, tmp_path: Path
) -> None:
    sft |= {"packing": packing}
    sft["data"]["streaming"] = streaming
    before = saved(open_stage(base_job, tmp_path))
    write(tmp_path / "rows.jsonl", OTHER[:7])
    changed = open_stage(base_job, tmp_path)
    told = refusal(before, changed, "stages[0].sft.maxSteps", "stages[1].sft.data.limit", "stages[0].sft.evalData")
    counts = "" if streaming else " (12 then, 7 now)"
    assert told.startswith(
        f"{FIELD}: other rows{counts} than at step 100, from which this stage resumes: restore the data"
    )
    assert told.endswith(f"such as --set {FIELD}.sources[0].file=rows.jsonl")
    for named in (FIELD, f"{FIELD}.sources[0].file", f"{FIELD}.limit"):
        found = compare(before, changed, named)
        assert found.other_rows and "continues with them, because --set names" in found.notes[0]


def test_a_row_that_changed_among_as_many_is_seen(base_job: Job, tmp_path: Path) -> None:
    before = saved(open_stage(base_job, tmp_path))
    write(tmp_path / "rows.jsonl", [*ROWS[:11], OTHER[11]])
    assert "other rows (12 then, 12 now)" in refusal(before, open_stage(base_job, tmp_path))


@pytest.mark.parametrize(
    ("stage", "rows", "other"),
    [
        ({"pretrain": {"blockSize": 16}}, [{"text": "1 plus 1 makes 2. " * 20}], [{"text": "1 plus 2 makes 3. " * 20}]),
        ({"dpo": {}}, PAIRS, [{**row, "chosen": " makes 0"} for row in PAIRS]),
        ({"rlhf": {"rewards": [{"function": "a:b"}], **SHORT}}, ROWS, [dialogue("What?", "That.")]),
    ],
)
def test_every_kind_of_stage_knows_its_rows(
    stage: Job, rows: list[Job], other: list[Job], base_job: Job, tmp_path: Path
) -> None:
    [(kind, fields)] = stage.items()
    data = {"sources": [{"file": "own.jsonl"}]}
    base_job["spec"]["stages"] = [{kind: {**fields, "data": data, "maxSteps": 2}}]
    write(tmp_path / "own.jsonl", rows)
    before = saved(open_stage(base_job, tmp_path))
    assert compare(before, open_stage(base_job, tmp_path)) == Comparison(False, [])
    write(tmp_path / "own.jsonl", other)
    assert refusal(before, open_stage(base_job, tmp_path)).startswith(f"stages[0].{kind}.data: other rows")


def test_the_cause_is_named(base_job: Job, sft: Job, tiny_model: Path, tmp_path: Path) -> None:
    before = saved(open_stage(base_job, tmp_path))
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    base_job["spec"]["model"] = {"path": str(model)}
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    tokenizer.save_pretrained(model)
    assert refusal(before, open_stage(base_job, tmp_path)).startswith(
        f"{FIELD}: another chat template than at step 100"
    )
    sft["maxLength"] = 24
    told = refusal(before, open_stage(base_job, tmp_path))
    assert told.startswith(f"{FIELD}: another chat template and other lengths or another packing than at")


def test_other_held_out_rows_are_told(base_job: Job, sft: Job, tmp_path: Path) -> None:
    sft["evalData"] = {"sources": [{"inline": OTHER[:2]}]}
    before = saved(open_stage(base_job, tmp_path))
    sft["evalData"] = {"sources": [{"inline": OTHER[2:4]}]}
    [note] = compare(before, open_stage(base_job, tmp_path)).notes
    assert note.startswith("other held-out rows than at step 100")


def test_a_checkpoint_of_an_earlier_version_is_told(base_job: Job, tmp_path: Path) -> None:
    context = open_stage(base_job, tmp_path)
    [note] = compare(replace(saved(context), data=None), context).notes
    assert note == "the checkpoint of step 100 does not say what it was trained on"


def test_rounds_never_go_on_with_other_prompts(base_job: Job, tmp_path: Path) -> None:
    """The answers of a round belong to the earlier prompts."""

    def online(rows: list[Job]) -> StageContext:
        fields = {"data": {"sources": [{"inline": rows}]}, "judge": {"function": "a:b"}, **SHORT}
        base_job["spec"]["stages"] = [{"online": fields}]
        return open_stage(base_job, tmp_path)

    before = saved(online(ROWS))
    assert "belong to the earlier prompts" in refusal(before, online(OTHER[:5]), "stages[0].online.data")


def test_a_resumed_run_compares_before_it_trains(base_job: Job, write_job: Write, tmp_path: Path) -> None:
    """The driver opens the run, then prepares the data of the remaining stages."""
    job, storage = write_job(base_job), Storage(str(tmp_path / "runs/job"))
    context = open_stage(base_job, tmp_path)

    def prepare(*assignments: str, resume: bool = True) -> list[str]:
        run = open_run(
            run_config(read_job(job, [*assignments]), job, [*assignments]), storage, resume=resume, fresh=False
        )
        told: list[str] = []
        workers = plan_workers(run.job.spec.resources)
        Preparation(run, workers, storage, told.append).run_all(layouts(run), threading.Event())
        return told

    prepare(resume=False)
    store = CheckpointStore(storage, layouts(context.run)[0], tmp_path / "scratch")
    (store.local_directory(100) / "weights").mkdir(parents=True)
    (store.local_directory(100) / "weights/w").write_text("w")
    store.publish(100, world_size=1, zero=0, rows_per_step=8, shards=1, data=asdict(context.data.key))
    assert not any("step 100" in line for line in prepare())

    write(tmp_path / "rows.jsonl", OTHER)
    with pytest.raises(UserError, match=r"other rows \(12 then, 12 now\) than at step 100"):
        prepare()
    same = f"{FIELD}.sources[0].file=rows.jsonl"
    assert any("because --set names" in line for line in prepare(same))

    write(tmp_path / "other.jsonl", OTHER[:6])
    base_job["spec"]["stages"][0]["sft"]["data"]["sources"][0]["file"] = "other.jsonl"
    write_job(base_job)
    with pytest.raises(UserError, match=r"data\.sources: was .* when this stage began and is"):
        prepare()
    told = prepare(f"{FIELD}.sources[0].file=other.jsonl")
    assert any("other rows (12 then, 6 now) than at step 100" in line for line in told)


def test_the_fields_of_set_reach_the_run(base_job: Job, write_job: Write) -> None:
    job, assignments = write_job(base_job), ["spec.stages[0].sft.data.limit=3", "stages[0].sft.maxSteps=9"]
    run: RunConfig = run_config(read_job(job, assignments), job, assignments)
    assert run.overrides == ["stages[0].sft.data.limit", "stages[0].sft.maxSteps"]
