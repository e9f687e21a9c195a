"""Generation: batches, seeds, stop tokens, chat templates, streaming and options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune_trainer.errors import UserError
from finetune_trainer.generation.generate import generate, stream
from finetune_trainer.generation.load import Loaded, load
from finetune_trainer.generation.mask_filling import fill
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import encode, stop_ids

PROMPTS = ["Return", "What does the absolute value of the argument do?", "Join two", "a"]
SHORT = GenerationOptions(max_new_tokens=12)
SAMPLED = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=1.5, seed=7)


@pytest.fixture(scope="module")
def chat(llama_dir: Path) -> Loaded:
    return load(str(llama_dir), device="cpu")


@pytest.fixture(scope="module")
def plain(plain_dir: Path) -> Loaded:
    return load(str(plain_dir), device="cpu")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_answers_as_single_prompts_do(chat: Loaded, raw: bool, batch_size: int) -> None:
    alone = [generate(chat, [prompt], SHORT, raw=raw)[0] for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert generate(chat, PROMPTS, SHORT, raw=raw, batch_size=batch_size) == alone


def test_greedy_answers_are_the_likeliest_tokens(plain: Loaded) -> None:
    """Greedy decoding applies although the model's own generation config enables sampling."""
    ids = encode(plain.tokenizer, ["Return"])[0]
    start = len(ids)
    for _ in range(8):
        ids.append(int(plain.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = plain.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert generate(plain, ["Return"], GenerationOptions(max_new_tokens=8)) == [expected]


def test_a_seed_repeats_exactly(chat: Loaded) -> None:
    first = generate(chat, PROMPTS, SAMPLED)
    torch.rand(3)
    assert generate(chat, PROMPTS, SAMPLED) == first
    assert generate(chat, PROMPTS, GenerationOptions(**{**vars(SAMPLED), "seed": 8})) != first


def test_top_k_of_one_is_greedy(plain: Loaded) -> None:
    one = GenerationOptions(max_new_tokens=12, do_sample=True, top_k=1)
    assert generate(plain, PROMPTS, one) == generate(plain, PROMPTS, SHORT)


def test_beams_find_a_likelier_answer(plain: Loaded) -> None:
    def log_probability(answer: str) -> float:
        start, ids = len(encode(plain.tokenizer, ["Return"])[0]), encode(plain.tokenizer, ["Return" + answer])[0]
        logits = plain.model(input_ids=torch.tensor([ids])).logits[0].detach().log_softmax(-1)
        return float(sum(logits[at - 1, ids[at]] for at in range(start, len(ids))))

    greedy = generate(plain, ["Return"], GenerationOptions(max_new_tokens=4))[0]
    beam = generate(plain, ["Return"], GenerationOptions(max_new_tokens=4, num_beams=8))[0]
    assert log_probability(beam) >= log_probability(greedy)


def test_the_end_of_a_turn_ends_an_answer(chat: Loaded, plain: Loaded) -> None:
    turn_end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids(chat.tokenizer, None) == [0, turn_end]
    assert stop_ids(chat.tokenizer, [5, 6]) == [0, turn_end, 5, 6]
    assert stop_ids(plain.tokenizer, None) == [0], "it has no chat template"


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}END{% endfor %}"
PARTS = TURN.replace("{{ m.content }}", "{% for part in m.content %}{{ part['text'] }}{% endfor %}")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN.replace("END", "<|im_end|>\n"), "<|im_end|>"),
        (TURN.replace("END", " \n[end] <|im_end|>"), "<|im_end|>"),
        (TURN.replace("END", ""), "<|im_start|>"),  # the next turn's special token ends one (GLM)
        (PARTS.replace("END", "<|im_end|>"), "<|im_end|>"),  # content is a list of parts (SmolVLM, LLaVA)
        (TURN.replace("END", "").replace("<|im_start|>", "\n## "), None),  # ordinary text separates the turns
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_end_of_a_turn_is_read_from_the_template(template: str, end: str | None, llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = template
    ends = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    assert stop_ids(tokenizer, None) == sorted({tokenizer.eos_token_id, *ends})


def test_a_token_that_is_not_named_special_ends_a_turn_too(llama_dir: Path) -> None:
    """The tokenizer's files contain `<|im_end|>`, but its configuration does not list it as special."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    bare.chat_template = tokenizer.chat_template
    turn_end = bare.convert_tokens_to_ids("<|im_end|>")
    assert turn_end not in bare.all_special_ids
    assert stop_ids(bare, None) == [0, turn_end]


def test_an_answer_stops_at_the_end_of_its_turn(llama_dir: Path) -> None:
    """A model that always predicts a word runs to the limit; one that predicts the end of turn stops at once."""
    loaded = load(str(llama_dir), device="cpu")
    assert generate(_always(loaded, "a"), ["x"], SHORT) == ["a" * 12]
    assert generate(_always(loaded, "<|im_end|>"), ["x"], SHORT) == [""]
    assert list(stream(_always(loaded, "<|im_end|>"), "x", SHORT)) == []


def _always(loaded: Loaded, token: str) -> Loaded:
    head: Any = loaded.model.get_output_embeddings()
    norm: Any = loaded.model.model.norm
    with torch.no_grad():
        norm.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
        head.bias[loaded.tokenizer.convert_tokens_to_ids(token)] = 10.0
    return loaded


def test_a_text_is_a_users_message_where_there_is_a_template(chat: Loaded) -> None:
    [ids] = encode(chat.tokenizer, ["Hi"], system="Be kind.")
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(ids) == expected
    assert chat.tokenizer.decode(encode(chat.tokenizer, ["Hi"], raw=True)[0]) == "Hi"


def test_a_conversation_keeps_its_own_system_message(chat: Loaded) -> None:
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    assert encode(chat.tokenizer, [messages], system="Other.") == encode(chat.tokenizer, [messages])


def test_a_stream_is_the_whole_answer(chat: Loaded) -> None:
    for options in (SHORT, SAMPLED, GenerationOptions(max_new_tokens=12, num_beams=2)):
        assert "".join(stream(chat, "Return", options)) == generate(chat, ["Return"], options)[0]


def test_a_closed_stream_stops_the_model(llama_dir: Path) -> None:
    loaded = load(str(llama_dir), device="cpu")
    calls = _count_calls(loaded)
    pieces = stream(_always(loaded, "Ġ"), "Return", GenerationOptions(max_new_tokens=10_000))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    done = len(calls)
    assert 0 < done < 70
    assert len(calls) == done


def _count_calls(loaded: Loaded) -> list[int]:
    calls: list[int] = []
    loaded.model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_failure_in_the_stream_reaches_the_caller(llama_dir: Path) -> None:
    loaded = load(str(llama_dir), device="cpu")

    def fail(*_: Any) -> None:
        raise RuntimeError("broken layer")

    loaded.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        list(stream(loaded, "Return", SHORT))


def test_answers_end_where_the_context_does(llama_dir: Path) -> None:
    loaded = _always(load(str(llama_dir), device="cpu"), "a")
    assert generate(loaded, ["c" * 90], GenerationOptions(max_new_tokens=1000), raw=True) == ["a" * (96 - 90)]


@pytest.mark.parametrize(
    ("call", "messages"),
    [
        (lambda it: generate(it, ["", "a" * 500]), ["prompts[0]: is empty"]),
        (lambda it: generate(it, ["a", "a" * 500]), ["prompts[1]: 500 tokens leave no room", "context of 96"]),
        (
            lambda it: generate(it, [[{"role": "user", "content": "x"}]]),
            ["prompts[0]: is a conversation, but the token"],
        ),
        (
            lambda it: generate(it, ["a"], GenerationOptions(system="s")),
            ["system: needs a chat, but the tokenizer has"],
        ),
        (lambda it: fill(it, "a <mask>"), ["use generate"]),
    ],
)
def test_prompts_that_do_not_fit_are_named(
    plain: Loaded, call: Callable[[Loaded], object], messages: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        call(plain)
    assert all(message in str(error.value) for message in messages)


def test_options_report_all_their_faults_at_once() -> None:
    with pytest.raises(UserError) as error:
        GenerationOptions(max_new_tokens=0, temperature=0.0, num_beams=0, top_p=1.5, repetition_penalty=0, seed=-1)
    assert [problem.path for problem in error.value.problems] == [
        "max_new_tokens", "temperature", "top_p", "num_beams", "repetition_penalty", "seed", "temperature", "top_p",
    ]  # fmt: skip
    assert "temperature: got 0.0, expected more than 0" in str(error.value)


def test_beams_and_sampling_exclude_each_other() -> None:
    with pytest.raises(UserError, match="num_beams: got 4 with do_sample: choose"):
        GenerationOptions(do_sample=True, num_beams=4)


def test_masks_are_filled_by_probability(masked_dir: Path) -> None:
    loaded = load(str(masked_dir), device="cpu")
    [one] = fill(loaded, "Return the <mask> value", top_k=3)
    assert len(one) == 3
    assert [each.probability for each in one] == sorted((each.probability for each in one), reverse=True)
    assert len(fill(loaded, "<mask> the <mask>")) == 2
    with pytest.raises(UserError, match="expected a text with the mask token <mask>"):
        fill(loaded, "no mask")
    with pytest.raises(UserError, match="use fill"):
        generate(loaded, ["Return"])
