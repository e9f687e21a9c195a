"""Real data end to end: examples/real_data.yaml as it stands. Texts of the dialogues are never printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import done, run

from finetune_trainer.progress.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
FILES = ("tinyshakespeare.txt", "text2cypher.csv", "text2cypher_schemas.csv", "hh-harmless-test.jsonl.gz")
MISSING = [name for name in FILES if not (DATA / name).is_file()]


@pytest.mark.skipif(bool(MISSING), reason=f"the real data is not here: {DATA} lacks {', '.join(MISSING)}")
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_three_stages_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On data held out, the loss of every stage falls, and DPO ranks more than 0.55 of the pairs rightly."""
    monkeypatch.chdir(ROOT)
    code, output = run(Path("examples/real_data.yaml"), "--set", f"storage.path={tmp_path}", timeout=1800)
    assert code == 0, output
    pretrain, sft, dpo = (tmp_path / "real-data/stages" / name for name in ("01-pretrain", "02-sft", "03-dpo"))
    for stage in (pretrain, sft, dpo):
        facts = done(stage)
        assert (facts["zero"], facts["world_size"]) == (2, 2)
        before, after = _held_out(stage)
        print(f"{stage.name}: held-out loss {before['eval_loss']:.4f} -> {after['eval_loss']:.4f}")
        assert after["eval_loss"] < before["eval_loss"]
        assert (stage / "result/model.safetensors").is_file()
    accuracy, pairs = done(dpo)["metrics"]["eval_rewards/accuracies"], json.loads((dpo / "data.json").read_text())
    print(f"reward accuracy on {pairs['eval_rows']} held-out pairs: {accuracy:.3f}")
    assert accuracy > 0.55


def _held_out(stage: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured before the first step, and at the end."""
    rows = read_metrics((stage / "metrics.jsonl").read_text())
    measured = [row for row in rows if "eval_loss" in (row.get("metrics") or {})]
    assert measured[0]["step"] == 0 and measured[-1]["step"] == measured[-1]["total"]
    return measured[0]["metrics"], measured[-1]["metrics"]
