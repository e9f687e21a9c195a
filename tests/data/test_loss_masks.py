"""Which tokens are trained on: masks decoded to text, truncation, packing and preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data.data_cases import dpo, inline, made, pretrain, sft, trained_text, turns
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from finetune_trainer.data import PackedCollator, PreferenceCollator
from finetune_trainer.data.packing import pack
from finetune_trainer.errors import UserError

Tok = PreTrainedTokenizerFast
TALK = turns("Hi there", "Hello é!", "Bye", "See you")
UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _plain(tokenizer: Tok, template: str | None) -> Tok:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    other.chat_template = template
    return other


@pytest.mark.parametrize("marked", [True, False])
def test_every_assistant_turn_trains_and_nothing_else(marked: bool, tokenizer: Tok, tmp_path: Path) -> None:
    chosen = tokenizer if marked else _plain(tokenizer, UNMARKED)
    row = made(sft(inline([{"messages": TALK}])), chosen, tmp_path).train[0]
    assert trained_text(chosen, row) == "Hello é!<|im_end|>See you<|im_end|>"
    assert "Hi there" in chosen.decode(row["input_ids"])


@pytest.mark.parametrize(
    ("row", "more", "trained"),
    [
        ({"prompt": "Q: why? A:", "completion": " so"}, {}, " so<|endoftext|>"),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, {}, "See you<|im_end|>"),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}, "b<|im_end|>"),
        ({"q": "x", "a": "y"}, {"template": {"prompt": "{q}?", "completion": "{{{a}}}"}}, "{y}<|im_end|>"),
        ({"text": "\n\nHuman: a\n\nAssistant: b"}, {"transcript": {}}, "b<|im_end|>"),
    ],
)
def test_forms(row: dict[str, Any], more: dict[str, Any], trained: str, tokenizer: Tok, tmp_path: Path) -> None:
    first = made(sft(inline([row], **more)), tokenizer, tmp_path).train[0]
    assert trained_text(tokenizer, first) == trained


def test_plain_text_trains_on_all_but_its_first_token(tokenizer: Tok, tmp_path: Path) -> None:
    row = made(sft(inline([{"text": "Some words"}])), tokenizer, tmp_path).train[0]
    assert tokenizer.decode(row["input_ids"]) == "Some words<|endoftext|>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_template_without_chat_template_is_plain_text(tokenizer: Tok, tmp_path: Path) -> None:
    data = inline([{"q": "x", "a": "y"}], template={"system": "s", "prompt": "{q}", "completion": "{a}"})
    row = made(sft(data), _plain(tokenizer, None), tmp_path).train[0]
    assert tokenizer.decode(row["input_ids"]) == "s\n\nxy<|endoftext|>"
    assert trained_text(tokenizer, row) == "y<|endoftext|>"


def _lengths(tokenizer: Tok, texts: list[str]) -> list[int]:
    return [len(tokenizer(text)["input_ids"]) + 1 for text in texts]


def test_overflow_in_numbers(tokenizer: Tok, tmp_path: Path) -> None:
    texts = ["word " * 5, "word " * 100, "word " * 60]
    lengths = _lengths(tokenizer, texts)
    data = inline([{"text": text} for text in texts])
    cut = made(sft(data, maxLength=32), tokenizer, tmp_path).report
    assert (cut.truncated_examples, cut.longest, cut.kept) == (2, max(lengths), 3)
    assert cut.truncated_tokens == sum(length - 32 for length in lengths if length > 32)
    assert cut.tokens == sum(min(length, 32) for length in lengths)
    drop = made(sft(data, maxLength=32, overflow="drop"), tokenizer, tmp_path).report
    assert (drop.dropped, drop.kept, drop.dropped_tokens) == ({"too long": 2}, 1, lengths[1] + lengths[2])
    split = made(sft(data, maxLength=32, overflow="split"), tokenizer, tmp_path)
    joined = [token for row in split.train for token in row["input_ids"]]
    assert len(joined) == sum(lengths)
    with pytest.raises(UserError, match=rf"2 of 3 examples are longer than 32.*{max(lengths)}.*row 1"):
        made(sft(data), tokenizer, tmp_path, context=32)


def test_a_cut_that_leaves_nothing_to_learn(tokenizer: Tok, tmp_path: Path) -> None:
    rows = [{"prompt": "long " * 50, "completion": "x"}, {"prompt": "a", "completion": "b"}]
    report = made(sft(inline(rows), maxLength=16), tokenizer, tmp_path).report
    assert (report.kept, report.dropped, report.truncated_examples) == (1, {"nothing to learn": 1}, 0)
    with pytest.raises(UserError, match=r"nothing is left .* of 1 rows: 1 nothing to learn \(raise maxLength\)"):
        made(sft(inline(rows[:1]), maxLength=16), tokenizer, tmp_path)


def test_dialogues_without_an_answer(tokenizer: Tok, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with pytest.raises(UserError, match=r"nothing is left to train on of 1 rows: 1 no assistant turn$"):
        made(sft(inline(rows), maxLength=64), tokenizer, tmp_path)


def test_length_beyond_the_context(tokenizer: Tok, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"maxLength: got 64, but the model's context is 32"):
        made(sft(inline([{"text": "a"}]), maxLength=64), tokenizer, tmp_path, context=32)


def test_pretraining_blocks_are_the_documents_joined(tokenizer: Tok, tmp_path: Path) -> None:
    texts = ["The first document.", "Zweites é", "and a third one " * 20]
    done = made(pretrain(inline([{"text": text} for text in texts]), blockSize=16), tokenizer, tmp_path)
    whole = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert [token for row in done.train for token in row["input_ids"]] == whole[: len(whole) // 16 * 16]
    assert done.report.dropped_tokens == len(whole) % 16


def test_bins_hold_everything_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    bins = pack(lengths, 100)
    assert sorted(index for one in bins for index in one) == list(range(500))
    assert max(sum(lengths[one]) for one in bins) <= 100
    assert len(bins) <= 1.05 * lengths.sum() / 100 + 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked(attention: str, tokenizer: Tok, tmp_path: Path) -> None:
    texts = ["a short one", "one that is a good deal longer " * 2, "mid size text", "x y z", "again " * 12]
    data = inline([{"text": text} for text in texts])
    apart = made(sft(data, maxLength=48), tokenizer, tmp_path).train
    packed = made(sft(data, maxLength=48, packing=True), tokenizer, tmp_path).train
    assert len(packed) < len(apart)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    batch = PackedCollator(tokenizer.pad_token_id, 48)(list(packed))
    assert batch["input_ids"].shape[0] >= 2 and "attention_mask" not in batch
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        alone = {tuple(row["input_ids"]): _alone(model, row) for row in apart}
    for number, row in enumerate(packed):
        end = 0
        for length in row["seq_lengths"]:
            start, end = end, end + length
            expected = alone[tuple(row["input_ids"][start:end])]
            torch.testing.assert_close(logits[number, start:end], expected, atol=1e-5, rtol=1e-5)
            assert labels[number, start] == -100
    shifted = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    apart_loss = [cross_entropy(alone[tuple(row["input_ids"])][:-1], torch.tensor(row["labels"])[1:], reduction="sum")
                  for row in apart]  # fmt: skip
    count = sum(len(row["labels"]) - 1 for row in apart)
    assert abs(shifted.item() - sum(apart_loss).item() / count) < 1e-5


def _alone(model: Qwen3ForCausalLM, row: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    return logits


def _answer(tokenizer: Tok, row: dict[str, Any], side: str) -> str:
    return tokenizer.decode([i for i, m in zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True) if m])


def test_user_turns_after_the_prompt_carry_no_loss(tokenizer: Tok, tmp_path: Path) -> None:
    good, bad = turns("Hi", "one", "more", "two"), turns("Hi", "uno", "mas", "dos")
    row = made(dpo(inline([{"chosen": good, "rejected": bad}])), tokenizer, tmp_path).train[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert _answer(tokenizer, row, "chosen") == "one<|im_end|>two<|im_end|>"
    assert _answer(tokenizer, row, "rejected") == "uno<|im_end|>dos<|im_end|>"
    assert "more" in tokenizer.decode(row["chosen_ids"])


def test_plain_pairs_and_the_collator_are_trls(tokenizer: Tok, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Why?", "chosen": " since", "rejected": " no idea at all"},
        {"chosen": "ab c", "rejected": "ab d"},
    ]
    done = list(made(dpo(inline(rows)), tokenizer, tmp_path).train)
    assert tokenizer.decode(done[0]["chosen_ids"]) == " since<|endoftext|>"
    ours = PreferenceCollator(tokenizer.pad_token_id)([{**row, "ref_chosen_logps": 1.0} for row in done])
    theirs = DataCollatorForPreference(tokenizer.pad_token_id)([{**row, "ref_chosen_logps": 1.0} for row in done])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_identical_pairs(tokenizer: Tok, tmp_path: Path) -> None:
    same, pair = {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}
    report = made(dpo(inline([same, pair])), tokenizer, tmp_path).report
    assert (report.kept, report.dropped) == (1, {"identical pair": 1})
    with pytest.raises(UserError, match="2 of 3 pairs"):
        made(dpo(inline([same, same, pair])), tokenizer, tmp_path)


def test_conversation_without_a_chat_template(tokenizer: Tok, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        made(sft(inline([{"messages": TALK}])), _plain(tokenizer, None), tmp_path)
