from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from support.plan.tiny_models import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from finetune_api.training import Lora
from finetune_trainer.errors import UserError
from finetune_trainer.model.lora import lora_config
from finetune_trainer.plan.model_size import adapter_size, meta_model, model_size

CAUSAL = ["llama", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe"]
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "modernbert"])
def test_total_is_the_real_models(family: str) -> None:
    masked = family in ("bert", "modernbert")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    size = model_size(meta_model(tiny(family), "masked" if masked else "causal"))
    assert size.total == auto.from_config(tiny(family)).num_parameters()


def test_llama_3_1_8b() -> None:
    size = model_size(meta_model(AutoConfig.for_model("llama", **LLAMA_8B)))
    assert size.total == 8_030_261_248
    assert size.matmul == size.total - 128256 * 4096
    assert (size.layers, size.heads, size.key_value_heads, size.head_dim) == (32, 32, 8, 128)
    assert adapter_size(meta_model(AutoConfig.for_model("llama", **LLAMA_8B)), Lora()).parameters == 41_943_040


def test_parts_of_an_expert_model() -> None:
    size = model_size(meta_model(tiny("qwen3_moe")))
    expert = 3 * 32 * 16
    assert size.expert == 2 * 4 * expert
    assert size.active == size.total - 2 * 2 * expert
    assert (size.experts, size.experts_per_token, size.expert_layers) == (4, 2, 2)
    assert size.gated and size.query_key_norm


def test_tied_weights_count_once() -> None:
    tied = model_size(meta_model(tiny("qwen3")))
    untied = model_size(meta_model(tiny("qwen3", tie_word_embeddings=False)))
    assert untied.total - tied.total == 128 * 32
    assert tied.tied and tied.matmul == untied.matmul


def test_a_model_that_cannot_be_built_is_a_users_error() -> None:
    with pytest.raises(UserError, match="model: bert can't be built"):
        meta_model(tiny("bert", hidden_size=33), "masked")


LORAS = [
    Lora(),
    Lora(r=4, targetModules=["q_proj", "v_proj"]),
    Lora(r=4, targetModules=["q_proj"], modulesToSave=["embed_tokens"]),
    Lora(r=8, targetModules=["self_attn.o_proj"], useDora=True, useRslora=True),
]


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("spec", LORAS, ids=range(len(LORAS)))
def test_trainable_is_pefts(family: str, spec: Lora) -> None:
    real = AutoModelForCausalLM.from_config(tiny(family))
    adapted = get_peft_model(real, lora_config(spec, real))
    assert adapter_size(meta_model(tiny(family)), spec).parameters == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("family", CAUSAL)
def test_all_linear_leaves_router_and_head_alone_and_trains(family: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny(family))
    adapted = get_peft_model(model, lora_config(Lora(r=2), model))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert not [name for name in trained if "lm_head" in name or ".mlp.gate." in name or "shared_expert_gate" in name]
    assert [name for name in trained if "q_proj" in name] and [name for name in trained if ".mlp." in name]
    ids = torch.arange(8)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Lora(targetModules=["q_prj"]), "stages[1].sft.lora.targetModules: no module of the model goes by 'q_prj': "
         "did you mean `q_proj`?"),
        (Lora(targetModules=["lm_head"]), "'lm_head' is the output head, which takes no adapter"),
        (Lora(modulesToSave=["embed_token"]), "lora.modulesToSave: no module of the model goes by 'embed_token': "
         "did you mean `embed_tokens`?"),
    ],
)  # fmt: skip
def test_names_that_match_nothing(spec: Lora, message: str) -> None:
    with pytest.raises(UserError) as caught:
        lora_config(spec, meta_model(tiny("llama")), "stages[1].sft.lora")
    assert message in str(caught.value)


def test_every_fault_at_once() -> None:
    spec = Lora(targetModules=["all-linear", "nothing"], loraDropout=0.1, useDora=True, modulesToSave=["void"])
    with pytest.raises(UserError) as caught:
        lora_config(spec, meta_model(tiny("qwen3_moe")))
    assert [problem.path for problem in caught.value.problems] == [
        "lora.targetModules", "lora.loraDropout", "lora.useDora", "lora.modulesToSave"
    ]  # fmt: skip


def test_attention_adapters_of_an_expert_model_take_dropout() -> None:
    config = lora_config(Lora(targetModules=["q_proj"], loraDropout=0.1), meta_model(tiny("mixtral")))
    assert config.target_modules == {"q_proj"} and config.target_parameters is None


def test_tied_embeddings_take_no_adapter() -> None:
    """PEFT would adapt the tied head too, and TRL's trainers raise a ValueError after the model is loaded."""
    asked = Lora(targetModules=["q_proj", "embed_tokens"])
    with pytest.raises(UserError, match="'embed_tokens' is tied to the output head, which takes no adapter"):
        lora_config(asked, meta_model(tiny("qwen3")))
    assert lora_config(asked, meta_model(tiny("llama"))).target_modules == {"q_proj", "embed_tokens"}


def test_tied_embeddings_stay_tied() -> None:
    saved = Lora(targetModules=["q_proj"], modulesToSave=["embed_tokens"])
    assert lora_config(saved, meta_model(tiny("qwen3"))).ensure_weight_tying
    assert not lora_config(saved, meta_model(tiny("llama"))).ensure_weight_tying
    assert not lora_config(Lora(), meta_model(tiny("qwen3"))).ensure_weight_tying
