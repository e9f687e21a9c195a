"""Estimated and measured memory of a training step on the CPU: `python benchmarks/memory_plan.py`.

Each case runs in a process of its own and compares the peak resident memory of three AdamW steps in float32, over that
of the warm process, with the plan's parts without `context`.
glibc's heap fragments; `MALLOC_MMAP_THRESHOLD_=1048576` in the environment shows what is in use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from finetune_api.training import Lora
from finetune_trainer.model.lora import lora_config
from finetune_trainer.plan.memory import Workload, estimate
from finetune_trainer.plan.model_size import adapter_size, meta_model, model_size
from finetune_trainer.plan.quantities import human_bytes

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8}
CASES: dict[str, dict[str, Any]] = {
    "llama 10M, 8 x 256": {"fields": SMALL, "batch": 8, "length": 256},
    "llama 10M, 4 x 1024": {"fields": SMALL, "batch": 4, "length": 1024},
    "llama 50M, 4 x 512": {"fields": LARGE, "batch": 4, "length": 512},
    "llama 50M, 1 x 128": {"fields": LARGE, "batch": 1, "length": 128},
    "llama 50M, 4 x 512, checkpointing": {"fields": LARGE, "batch": 4, "length": 512, "checkpointing": True},
    "llama 50M, 4 x 512, LoRA": {"fields": LARGE, "batch": 4, "length": 512, "lora": True},
    "llama 10M, 4 x 512, eager": {"fields": SMALL, "batch": 4, "length": 512, "eager": True},
    "qwen3 50M, 4 x 512": {"family": "qwen3", "fields": LARGE | {"head_dim": 64}, "batch": 4, "length": 512},
    "bert 10M, 8 x 256": {"family": "bert", "fields": SMALL, "batch": 8, "length": 256, "masked": True},
}


def main() -> None:
    """Run all cases, or the case named by the argument in this process."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(**CASES[sys.argv[1]])))
        return
    for name, case in CASES.items():
        child = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        measured = json.loads(child.stdout.splitlines()[-1])
        parts = planned(**case)
        total = sum(parts.values())
        shown = ", ".join(f"{part} {human_bytes(count)}" for part, count in parts.items() if count)
        ratio = f"planned {human_bytes(total)} / measured {human_bytes(measured)} = {total / measured:.2f}"
        print(f"{name}: {ratio} ({shown})")


def configuration(family: str, fields: dict[str, int], length: int) -> PretrainedConfig:
    """Return the configuration of a case's model, with 8000 tokens."""
    return AutoConfig.for_model(family, **_known(family, fields), vocab_size=8000, max_position_embeddings=length)


def _known(family: str, fields: dict[str, int]) -> dict[str, int]:
    """Set as many key heads as heads, in families that group them."""
    return fields if family == "bert" else fields | {"num_key_value_heads": fields["num_attention_heads"]}


def planned(*, fields: dict[str, int], family: str = "llama", **case: Any) -> dict[str, int]:
    """Return the plan's bytes by part."""
    config = configuration(family, fields, case["length"])
    load = Workload(
        batch=case["batch"],
        length=case["length"],
        dtype_bytes=4,
        adapter=adapter_size(meta_model(config), Lora()) if case.get("lora") else None,
        checkpointing=case.get("checkpointing", False),
        eager=case.get("eager", False),
        full_logits=case.get("masked", False),
        kind="cpu",
    )
    parts = estimate(model_size(meta_model(config, "masked" if case.get("masked") else "causal")), load).parts()
    return {name: count for name, count in parts.items() if name != "context"}


def measure(*, fields: dict[str, int], family: str = "llama", **case: Any) -> int:
    """Return the peak resident bytes of three steps over the warm process."""
    torch.set_num_threads(2)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    train(family, tiny, case | {"batch": 1, "length": 16})
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    train(family, fields, case)
    return resident("VmHWM") - before


def train(family: str, fields: dict[str, int], case: dict[str, Any]) -> None:
    """Train three steps of AdamW on random tokens, with the loss that the trainers use."""
    model = build(configuration(family, fields, case["length"]), case)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    ids = torch.randint(0, 8000, (case["batch"], case["length"]))
    head = {} if case.get("masked") else {"fused_lm_head": True}
    for _ in range(3):
        model(input_ids=ids, labels=ids, **head).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build(config: PretrainedConfig, case: dict[str, Any]) -> PreTrainedModel:
    """Return a case's model, ready to train."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from trl.trainer.utils import add_fused_lm_head

    auto = AutoModelForMaskedLM if case.get("masked") else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager" if case.get("eager") else "sdpa")
    model.config.use_cache = False
    if not case.get("masked"):
        add_fused_lm_head(model)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable()
    if case.get("lora"):
        model = get_peft_model(model, lora_config(Lora(), model))
    return model.train()


def resident(field: str) -> int:
    """Return a field of `/proc/self/status` in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
