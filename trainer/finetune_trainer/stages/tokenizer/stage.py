"""Train a byte-level BPE tokenizer in the format of Hugging Face's fast tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_api.stages import TokenizerSpec

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
MASK = "<|mask|>"
PAD = "<|pad|>"
BUILT_IN = [END_OF_TEXT, START_OF_TURN, END_OF_TURN, MASK, PAD]


def train_tokenizer(
    spec: TokenizerSpec, texts: Iterable[str], context: int | None, show_progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenization and a ChatML template.

    The template marks assistant tokens with `{% generation %}`, from which SFT makes its label masks.

    Args:
        texts: the corpus, read once in batches, so it may be larger than memory.
        context: `model_max_length` in tokens if the spec sets none.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        min_frequency=spec.min_frequency,
        special_tokens=BUILT_IN + spec.special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _as_transformers(tokenizer, spec, context)


def chat_template() -> str:
    """Return the ChatML template of trained tokenizers."""
    return files("finetune_trainer.stages.tokenizer").joinpath("chatml.jinja").read_text()


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> float | None:
    """Return the UTF-8 bytes per token of some texts, or None if they have no tokens."""
    size = tokens = 0
    for text in texts:
        size += len(text.encode())
        tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return size / tokens if tokens else None


def _as_transformers(tokenizer: Tokenizer, spec: TokenizerSpec, context: int | None) -> PreTrainedTokenizerFast:
    length = spec.model_max_length or context
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers has no types here
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN, *spec.special_tokens],
        **({"model_max_length": length} if length else {}),
    )
    wrapped.chat_template = chat_template()
    return wrapped
