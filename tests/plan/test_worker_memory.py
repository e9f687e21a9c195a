from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from support.plan.tiny_models import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from finetune_api.cluster import Sharding
from finetune_api.training import Lora
from finetune_trainer.model.expert_matmul import factor_adapters
from finetune_trainer.model.lora import lora_config
from finetune_trainer.plan import activations, communication
from finetune_trainer.plan.memory import Memory, Workload, estimate
from finetune_trainer.plan.model_size import AdapterSize, adapter_size, meta_model, model_size
from finetune_trainer.plan.sharding_choice import choose_zero, sharding_problems, sharding_warnings

LLAMA_8B = AutoConfig.for_model(
    "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
N = 8_030_261_248
GIB = 1 << 30


@pytest.fixture(scope="module")
def llama():  # type: ignore[no-untyped-def]
    return model_size(meta_model(LLAMA_8B))


def static(size, load: Workload) -> int:  # type: ignore[no-untyped-def]
    parts = estimate(size, load)
    return parts.weights + parts.gradients + parts.optimizer


def test_states_of_full_training(llama) -> None:  # type: ignore[no-untyped-def]
    """16 bytes per parameter (ZeRO, arXiv 1910.02054, section 3.1), divided per stage as in its figure 1."""
    load = Workload(batch=1, length=1024, workers=8)
    assert static(llama, load) == 16 * N
    assert static(llama, replace(load, zero=1)) == pytest.approx((4 + 12 / 8) * N, rel=1e-6)
    assert static(llama, replace(load, zero=2)) == pytest.approx((2 + 14 / 8) * N, rel=1e-6)
    assert static(llama, replace(load, zero=3)) == pytest.approx(16 / 8 * N, rel=1e-6)
    assert static(llama, replace(load, dtype_bytes=4)) == 16 * N


def test_optimizer_and_gradients_are_adamws() -> None:
    model = AutoModelForCausalLM.from_config(tiny("qwen3"))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    parts = estimate(model_size(model), Workload(batch=1, length=8, dtype_bytes=4, kind="cpu"))
    assert parts.optimizer == sum(tensor.nbytes for tensor in moments)
    assert parts.gradients == sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)
    assert parts.weights == sum(weight.nbytes for weight in model.parameters())


def test_qlora(llama) -> None:  # type: ignore[no-untyped-def]
    """4.127 bits per linear weight (QLoRA, section 3), bfloat16 embedding and head, 16 bytes per adapter weight."""
    adapter = AdapterSize(parameters=41_943_040, input_features=1, rank_features=1)
    load = Workload(batch=1, length=1024, adapter=adapter, quantized_bits=4)
    linear = N - 2 * 128256 * 4096 - 65 * 4096
    expected = linear * 4.127 / 8 + 2 * (N - linear) + 16 * adapter.parameters
    assert static(llama, load) == pytest.approx(expected, rel=1e-4)
    bytes8 = static(llama, replace(load, quantized_bits=8)) - static(llama, load)
    assert bytes8 == pytest.approx(linear * (1 - 4.127 / 8), rel=1e-4)


def test_activations_follow_their_formula(llama) -> None:  # type: ignore[no-untyped-def]
    load = Workload(batch=2, length=1024)
    full = estimate(llama, load).activations
    assert estimate(llama, replace(load, batch=4)).activations == 2 * full
    assert estimate(llama, replace(load, checkpointing=True)).activations < full / 9
    scores = 32 * 32 * 1024 * 6 * 2048  # layers * heads * length * (float32 and bfloat16) * tokens
    assert estimate(llama, replace(load, eager=True)).activations == pytest.approx(full + scores)


def test_full_logits_and_tiles(llama) -> None:  # type: ignore[no-untyped-def]
    load = Workload(batch=8, length=1024)
    tiled, full = (estimate(llama, replace(load, full_logits=flag)).loss for flag in (False, True))
    assert full == 8 * 1024 * 128256 * 14
    assert tiled == 4096 * 32768 * 2 + 4 * 128256 * 4096 + 4 * 8 * 1024 * 4096


def test_offload_moves_to_the_host(llama) -> None:  # type: ignore[no-untyped-def]
    load = Workload(batch=1, length=1024, zero=3, workers=4)
    moved = estimate(llama, replace(load, offload_optimizer=True, offload_param=True))
    stays = estimate(llama, load)
    assert moved.weights == moved.optimizer == 0
    assert moved.host == stays.weights + stays.optimizer
    assert moved.total + moved.host == stays.total


def test_a_reference_model_is_divided_by_zero_3(llama) -> None:  # type: ignore[no-untyped-def]
    load = Workload(batch=1, length=1024, reference=True, workers=4)
    assert estimate(llama, load).reference == 4 * N  # loaded in float32 like the trained model
    assert estimate(llama, replace(load, zero=1)).reference == 2 * N
    assert estimate(llama, replace(load, zero=3)).reference == pytest.approx(N / 2, rel=1e-6)


def needs(zero: int) -> Memory:
    """Return the memory of a worker that needs 100, 60, 40 or 20 GiB under ZeRO-0 to 3."""
    return Memory((100, 60, 40, 20)[zero] * GIB, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("values", "workers", "gib", "bits", "expected"),
    [
        ({}, 4, 120, None, 0),
        ({}, 4, 100, None, 1),
        ({}, 4, 60, None, 2),
        ({}, 4, 40, None, 3),
        ({}, 4, 10, None, 3),
        ({}, 4, 10, 4, 2),
        ({}, 4, 10, 8, 2),
        ({}, 1, 10, None, 0),
        ({"offloadOptimizer": True}, 1, 200, None, 1),
        ({"offloadOptimizer": True}, 4, 200, None, 1),
        ({"zero": 2}, 4, 200, None, 2),
        ({"zero": 0}, 4, 10, None, 0),
    ],
)
def test_choose_zero(values: dict[str, object], workers: int, gib: int, bits: int | None, expected: int) -> None:
    zero, why = choose_zero(Sharding.model_validate(values), needs, workers, gib * GIB, bits)
    assert zero == expected
    assert f"ZeRO-{zero}" in why and f"{(100, 60, 40, 20)[zero]} GiB" in why


def test_why_gives_the_figures() -> None:
    _, why = choose_zero(Sharding(), needs, 4, 60 * GIB)
    assert why == (
        "ZeRO-2 needs 40 GiB per worker, which fits in 54 GiB (90% of the device); "
        "ZeRO-0 needs 100 GiB, ZeRO-1 needs 60 GiB"
    )
    assert "does not fit" in choose_zero(Sharding(), needs, 4, 10 * GIB)[1]


def test_combinations_that_cannot_work() -> None:
    zero3 = Sharding(zero=3)
    assert [problem.path for problem in sharding_problems(zero3, 8)] == ["sharding.zero"]
    assert sharding_problems(zero3, 4) == [] and "4-bit" in sharding_warnings(zero3, 4)[0]
    assert sharding_problems(Sharding(zero=2), 8) == sharding_problems(zero3, None) == []
    unchecked = Sharding.model_construct(zero=0, offload_optimizer=True, offload_param=True)
    assert len(sharding_problems(unchecked, None)) == 2


def test_constants_are_the_libraries() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    zero = DeepSpeedZeroConfig()
    assert (zero.reduce_bucket_size, zero.max_live_parameters) == (communication.BUCKET, communication.LIVE)
    assert chunked_logprob.TOKEN_CHUNK_SIZE == activations.LOSS_TOKENS
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == activations.LOSS_VOCAB


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "bert"])
def test_activations_are_what_autograd_saves(family: str, adapted: bool) -> None:
    """The plan is within 5% of the distinct storages that autograd saves, without the loss and the weights.

    For a mixture of experts they include LoRA's factors on the stacks; the plan also has one layer's gradients.
    """
    if adapted and family == "bert":
        pytest.skip("adapters are for causal models")
    fields = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    grouped = {} if family == "bert" else {"num_key_value_heads": 2, "head_dim": 32}
    config = tiny(family, **fields, **grouped)
    model = (AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM).from_config(config).train()
    size = model_size(model)
    adapter = adapter_size(meta_model(config), Lora(r=2)) if adapted else None
    trained = get_peft_model(model, lora_config(Lora(r=2), model)) if adapted else model
    factor_adapters(trained)
    weights = {weight.untyped_storage().data_ptr() for weight in trained.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    backbone = trained.get_base_model().model if adapted else trained.base_model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(input_ids=torch.randint(0, 128, (2, 64)), **({} if family == "bert" else {"use_cache": False}))
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)
    load = Workload(batch=2, length=64, dtype_bytes=4, adapter=adapter, kind="cpu")
    parts = estimate(size, load)
    factors = parts.experts * size.expert_layers / (size.expert_layers + 1)
    assert parts.activations + factors == pytest.approx(saved, rel=0.05)
