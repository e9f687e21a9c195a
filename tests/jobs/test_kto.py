"""The `kto` stage: the losses of TRL's KTOTrainer, labelled rows and pairs, resuming, memory, and learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from support.jobs.in_process import open_stage, resumed, trained
from transformers import AutoModelForCausalLM, PrinterCallback

from finetune_api.data import DataSpec
from finetune_api.stages import Stage
from finetune_trainer.data.encode import Encoder, Encoding
from finetune_trainer.data.report import Stats
from finetune_trainer.data.row_formats import EmptyRow, FormError, normalise
from finetune_trainer.stages.kto.stage import UnpairedCollator
from finetune_trainer.training.reset_state import reset_stage_state

Job = dict[str, Any]
REAL = Path(__file__).parents[3] / "shared/data/hh-harmless-test.jsonl.gz"
ROWS = [
    {"prompt": f"{n} plus 1", "completion": " makes" * (1 + n % 3) + f" {n}", "label": n % 3 != 0} for n in range(8)
]
PAIRS = [{"prompt": f"{n} plus 1", "chosen": f" makes {n + 1}", "rejected": f" says {n + 3}"} for n in range(4)]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": label}
    for row in PAIRS
    for side, label in (("chosen", True), ("rejected", False))
]


def kto(rows: list[Job], **fields: Any) -> Job:
    data = {"sources": [{"inline": rows}]}
    common = {"maxLength": 64, "maxSteps": 4, "learningRate": 1e-3, "perDeviceTrainBatchSize": 4}
    return {"kto": {"data": data, **common, **fields}}


def logged(job: Job, directory: Path, stage: Job) -> list[dict[str, float]]:
    job["spec"]["stages"] = [stage]
    with trained(open_stage(job, directory)) as trainer:
        return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_trl_has_the_same_losses(loss: str, base_job: Job, tiny_model: Path, tmp_path: Path) -> None:
    """Losses, KLs and rewards equal those of TRL's trainer on the rows in the order of the stage's steps."""
    fields = {"desirableWeight": 1.5, "undesirableWeight": 0.5, "lossType": loss, "beta": 0.3}
    base_job["spec"]["stages"] = [kto(ROWS, **fields)]
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        ours = [row for row in trainer.state.log_history if "loss" in row]
        args, order = trainer.args, [row for step in (0, 1) for row in trainer.rows_of(step)]
    sources = [context.tokenizer.decode(context.data.train[row]["prompt_ids"]) for row in order]
    by_prompt = {row["prompt"]: row for row in ROWS}
    rows = Dataset.from_list([next(by_prompt[text] for text in by_prompt if text in source) for source in sources])
    config = trl.KTOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, beta=0.3,
        loss_type=loss, desirable_weight=1.5, undesirable_weight=0.5, max_length=64, logging_steps=1, bf16=False,
        lr_scheduler_type=args.lr_scheduler_type, warmup_steps=args.warmup_steps, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, use_cpu=True, save_strategy="no", adam_epsilon=args.adam_epsilon,
    )  # fmt: skip
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    theirs = trl.KTOTrainer(model, reference, config, train_dataset=rows, processing_class=context.tokenizer)
    theirs.remove_callback(PrinterCallback)
    first = theirs.train().metrics
    found = [row for row in theirs.state.log_history if "loss" in row and "kl" in row]
    reset_stage_state()
    assert first["train_loss"] > 0 and len(found) == 2
    names = ["loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"]
    assert [found[0][name] for name in names] == pytest.approx([ours[0][name] for name in names], abs=1e-5)


def test_pairs_are_labelled_rows(base_job: Job, tmp_path: Path) -> None:
    """A pair becomes two rows: its chosen answer labelled true, and its rejected one labelled false."""
    paired, unpaired = (logged(base_job, tmp_path, kto(rows, seed=3)) for rows in (PAIRS, UNPAIRED))
    base_job["spec"]["stages"] = [kto(PAIRS)]
    rows = open_stage(base_job, tmp_path).data.train
    assert (len(rows), sum(row["label"][0] for row in rows)) == (8, 4)
    assert {name for row in (*paired, *unpaired) for name in row} >= {"kl", "rewards/margins"}


@pytest.mark.parametrize("fields", [{}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "quantization": {"bits": 4}}])
def test_a_resumed_run_is_an_undisturbed_one(fields: Job, base_job: Job, tmp_path: Path) -> None:
    base_job["spec"]["stages"] = [kto(ROWS, saveSteps=2, **fields)]
    context = open_stage(base_job, tmp_path)
    with trained(context) as trainer:
        whole = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        weights = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
    with resumed(context, 2) as trainer:
        assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == whole
        again = dict(trainer.model.named_parameters())
        assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert len(whole) == 4 and whole[3] < whole[2] < whole[0]


def test_rows_of_a_step_have_the_same_weight(base_job: Job, tmp_path: Path) -> None:
    """Without an estimate of the KL, passes of 4 and 3 rows equal one pass of 7 rows."""
    losses = []
    for size, passes in ((7, 1), (4, 2)):
        fields = {"perDeviceTrainBatchSize": size, "gradientAccumulationSteps": passes, "maxSteps": 3}
        stage = kto(ROWS[:7], lossType="apo_zero_unpaired", **fields)
        losses.append([row["loss"] for row in logged(base_job, tmp_path, stage)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][2] < losses[0][0]


def test_held_out_rows_have_margins(base_job: Job, tmp_path: Path) -> None:
    """The margin is the mean reward of desirable answers minus that of undesirable ones, for any batch size."""
    held = {"sources": [{"inline": ROWS}]}
    base_job["spec"]["stages"] = [kto(ROWS, evalData=held, lossType="apo_zero_unpaired")]
    found = []
    with trained(open_stage(base_job, tmp_path)) as trainer:
        for size in (1, 3, 8):
            trainer.args.per_device_eval_batch_size = size
            found.append(trainer.evaluate())
    for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/rejected", "entropy"):
        assert [one[f"eval_{name}"] for one in found] == pytest.approx([found[0][f"eval_{name}"]] * 3, abs=1e-5)
    assert found[0]["eval_rewards/margins"] != 0


def test_a_prompt_gets_the_answer_of_the_row_before() -> None:
    """As in TRL, the KL uses mismatched pairs, truncated if prompt and answer are too long together."""
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [4], "completion_mask": [1], "label": [1]},
        {"prompt_ids": [5], "completion_ids": [6, 7], "completion_mask": [0, 1], "label": [0]},
    ]
    batch = UnpairedCollator(9, 4, mismatched=True)(rows)
    assert batch["label"].tolist() == [True, False]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 9]]
    assert batch["KL_input_ids"].tolist() == [[1, 2, 3, 6], [5, 4, 9, 9]]
    assert batch["KL_completion_mask"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert not any(name.startswith("KL") for name in UnpairedCollator(9, 4, mismatched=False)(rows))


@pytest.mark.parametrize(("value", "expected"), [
    (True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False), ("1", True), (0.0, False),
])  # fmt: skip
def test_labels(value: object, expected: bool) -> None:
    assert _example({"prompt": "a", "completion": "b", "label": value})["label"] is expected


@pytest.mark.parametrize(("row", "reason"), [
    ({"prompt": "a", "completion": "b"}, "no `label`"),
    ({"prompt": "a", "completion": "b", "label": "good"}, "`label` is 'good', expected true"),
    ({"prompt": "a", "completion": "b", "label": 2}, "`label` is 2, expected true"),
    ({"text": "a", "label": True}, "needs `prompt`, `completion` and `label`"),
    ({"messages": [{"role": "user", "content": "a"}], "label": True}, "does not end with an assistant's answer"),
])  # fmt: skip
def test_rows_that_are_refused(row: Job, reason: str) -> None:
    with pytest.raises(FormError, match=reason):
        _example(row)
    with pytest.raises(EmptyRow):
        _example({"prompt": "a", "completion": "", "label": True})


def _example(row: Job) -> Job:
    return normalise(row, DataSpec.model_validate({"sources": [{"inline": [row]}]}), "unpaired")


def test_user_turns_in_an_answer_have_no_loss(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    turns = [("assistant", "first"), ("user", "and then"), ("assistant", "second")]
    row = {
        "prompt": [{"role": "user", "content": "go"}],
        "completion": [{"role": role, "content": text} for role, text in turns],
        "label": True,
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (made,) = Encoder(tokenizer, Encoding("unpaired", None)).rows([(0, _example(row))], Stats())
    text = tokenizer.decode(
        [one for one, on in zip(made["completion_ids"], made["completion_mask"], strict=True) if on]
    )
    assert "first" in text and "second" in text and "and then" not in text


@pytest.mark.parametrize(
    ("fields", "holds", "forwards"),
    [({}, True, 3), ({"lora": {}}, False, 3), ({"lossType": "apo_zero_unpaired"}, True, 1)],
)
def test_what_the_plan_counts(fields: Job, holds: bool, forwards: int) -> None:
    spec = Stage.model_validate(kto(ROWS, **fields)).kto
    assert spec is not None
    assert (spec.holds_reference, spec.extra_forwards, spec.sequences_per_row) == (holds, forwards, 1)


def test_one_row_in_a_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="perDeviceTrainBatchSize to 2 or more"):
        Stage.model_validate(kto(ROWS, perDeviceTrainBatchSize=1))
    Stage.model_validate(kto(ROWS, perDeviceTrainBatchSize=1, lossType="apo_zero_unpaired"))


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_loss_falls_on_real_pairs(base_job: Job, tmp_path: Path) -> None:
    data = {"sources": [{"file": str(REAL)}], "transcript": {}, "limit": 64}
    base_job["spec"]["model"]["attnImplementation"] = "sdpa"
    stage = {"kto": {"data": data, "maxLength": 64, "maxSteps": 24, "learningRate": 3e-3, "overflow": "truncate"}}
    rows = logged(base_job, tmp_path, stage)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1, json.dumps(losses)
    # A step whose rows all have the same label has no margin.
    margins = [row["rewards/margins"] for row in rows if "rewards/margins" in row]
    assert margins[-1] > margins[0]
