"""Batched generation: padding, several samples per row, stop strings, and no changes to the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from finetune_api.generation import Generation
from finetune_trainer.generation.batches import Completion, generate_batch
from finetune_trainer.generation.load import Loaded, load
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import encode
from finetune_trainer.generation.sampling import SeededSampling, draws

PROMPTS: list[str] = ["Return", "What does the absolute value of the argument do?", "Join two", "a"]
SAMPLED = GenerationOptions(max_new_tokens=10, do_sample=True, temperature=1.5, top_p=0.95)


@pytest.fixture(scope="module")
def chat(llama_dir: Path) -> Loaded:
    return load(str(llama_dir), device="cpu")


def _texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def test_a_sample_is_the_same_in_every_batch(chat: Loaded) -> None:
    """A sample depends on its prompt's key and its own number only, not on the rest of the batch."""
    model, tokenizer = chat.model, chat.tokenizer
    together = _texts(generate_batch(model, tokenizer, PROMPTS, SAMPLED, 3, samples=2))
    alone = [
        text
        for key, prompt in enumerate(PROMPTS)
        for text in _texts(generate_batch(model, tokenizer, [prompt], SAMPLED, 3, keys=[key], samples=2))
    ]
    assert together == alone
    assert len(set(together)) > len(PROMPTS)
    assert together[::2] == _texts(generate_batch(model, tokenizer, PROMPTS, SAMPLED, 3))
    assert together != _texts(generate_batch(model, tokenizer, PROMPTS, SAMPLED, 4, samples=2))


def test_tokens_are_drawn_by_their_probability() -> None:
    """In 5000 draws each frequency is within 4 standard errors of its probability; top-k excludes the other tokens."""
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(5000, 1)
    sampling = SeededSampling(GenerationOptions(do_sample=True, top_k=3, temperature=2.0), draws(0, _rows(5000), 1))
    drawn = Counter(sampling(torch.zeros(5000, 1, dtype=torch.long), scores).argmax(-1).tolist())  # type: ignore[arg-type]
    expected = torch.softmax(scores[0, 1:] / 2, -1)
    assert drawn[0] == 0
    for token, probability in enumerate(expected.tolist(), start=1):
        assert abs(drawn[token] / 5000 - probability) < 4 * (probability * (1 - probability) / 5000) ** 0.5


def _rows(count: int) -> list[tuple[int, int]]:
    return [(row, 0) for row in range(count)]


def test_token_ids_are_prompts_too(chat: Loaded) -> None:
    options = GenerationOptions(max_new_tokens=8)
    ids = encode(chat.tokenizer, PROMPTS)
    given = generate_batch(chat.model, chat.tokenizer, ids, options)
    assert given == generate_batch(chat.model, chat.tokenizer, PROMPTS, options)
    assert [completion.prompt for completion in given] == ids


def test_a_stop_text_ends_its_own_answer_alone(chat: Loaded) -> None:
    whole = generate_batch(chat.model, chat.tokenizer, PROMPTS, GenerationOptions(max_new_tokens=12))
    stop = next(letter for letter in whole[0].text[1:-1] if letter.isascii())
    cut = generate_batch(chat.model, chat.tokenizer, PROMPTS, GenerationOptions(max_new_tokens=12, stop=(stop,)))
    assert _texts(cut) == [completion.text.split(stop)[0] for completion in whole]
    assert [completion.finished for completion in cut] == [stop in completion.text for completion in whole]
    assert cut[0].tokens == whole[0].tokens[: len(cut[0].tokens)]
    assert stop in chat.tokenizer.decode(cut[0].tokens)
    assert stop not in chat.tokenizer.decode(cut[0].tokens[:-1])


def test_the_model_and_the_random_state_are_left_as_they_were(chat: Loaded) -> None:
    chat.model.train()
    state = torch.get_rng_state()
    generate_batch(chat.model, chat.tokenizer, PROMPTS, SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    assert chat.model.training
    chat.model.eval()


def test_what_cannot_be_answered_is_refused(chat: Loaded) -> None:
    assert generate_batch(chat.model, chat.tokenizer, [], SAMPLED) == []
    with pytest.raises(ValueError, match="would all be the same"):
        generate_batch(chat.model, chat.tokenizer, PROMPTS, GenerationOptions(), samples=2)
    with pytest.raises(ValueError, match="96 tokens leaves no room"):
        generate_batch(chat.model, chat.tokenizer, [[5] * 96], GenerationOptions())


def test_a_jobs_generation_becomes_options() -> None:
    spec = Generation.model_validate({"maxNewTokens": 5, "doSample": True, "topK": 3, "stop": ["x"]})
    assert GenerationOptions.of(spec) == GenerationOptions(max_new_tokens=5, do_sample=True, top_k=3, stop=("x",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topP": 0.5, "topK": 3}, "topP and topK without doSample"),
        ({"doSample": True, "numBeams": 2}, "numBeams above 1"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation.model_validate(fields)


@pytest.mark.parametrize(("variable", "enabled"), [(None, False), ("0", True), ("1", True)])
def test_cudnn_attention_is_disabled_while_answers_grow(
    chat: Loaded, monkeypatch: pytest.MonkeyPatch, variable: str | None, enabled: bool
) -> None:
    """CuDNN builds a plan for each new length, so it would build one for every token of an answer.

    If the user has set torch's variable, torch decides.
    """
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", variable)
    seen: list[bool] = []
    hook = chat.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    try:
        generate_batch(chat.model, chat.tokenizer, PROMPTS[:2], GenerationOptions(max_new_tokens=3))
    finally:
        hook.remove()
    assert seen and set(seen) == {enabled}
    assert torch.backends.cuda.cudnn_sdp_enabled()
