"""The commands `chat` and `generate`. Heavy libraries are imported only when a command runs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.outcome import guarded

if TYPE_CHECKING:
    from finetune_trainer.generation.load import Loaded
    from finetune_trainer.generation.options import GenerationOptions
    from finetune_trainer.generation.prompts import Prompt

ResultDir = Annotated[
    str,
    typer.Argument(
        metavar="RESULT_DIR",
        help="Directory of a job (its last finished stage is used), `result` of a stage, or any saved transformers "
        "model or PEFT adapter.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum number of tokens of an answer.")]
Sample = Annotated[
    bool,
    typer.Option(
        "--sample", help="Sample tokens. Implied by --temperature, --top-p and --top-k. Default: greedy decoding."
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sampling temperature. Below 1: less random, above 1: more random. Default: 1.")
]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the most likely tokens whose probabilities add up to this value.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")]
Beams = Annotated[int, typer.Option(help="Number of beams of beam search. 1: no beam search.")]
Penalty = Annotated[
    float, typer.Option(help="Values above 1 make tokens that have occurred less likely. 1: no penalty.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed, for reproducible sampling. Default: random.")]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--chat",
        help="--raw: continue the text without a chat template. --chat: apply the chat template. Default: as the model "
        "was trained; if that is not known, apply the chat template if there is one.",
    ),
]
System = Annotated[str | None, typer.Option(help="System message before the conversation.")]
Device = Annotated[
    str, typer.Option(help="Device, such as `cpu`, `cuda` or `cuda:1`. `auto`: the first accelerator, else the CPU.")
]


def chat_command(
    result_dir: ResultDir,
    prompt: Annotated[str | None, typer.Option(help="Answer this prompt and exit.")] = None,
    raw: Raw = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: Beams = 1,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Chat with a trained model.

    The conversation is kept between prompts. `/help` lists the commands, Ctrl-C stops an answer, Ctrl-D exits. A model
    that was trained on plain text continues each line on its own. Standard input can also be a pipe with one prompt per
    line. The default is greedy decoding.
    """
    values = _values(system, max_new_tokens, sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    guarded(lambda: _chat(result_dir, device, values, prompt, raw))


def generate_command(
    result_dir: ResultDir,
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="A prompt. Can be repeated. `-` reads the prompt from standard input.")
    ] = [],  # noqa: B006  # typer's form
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="File with prompts: `.jsonl` rows with `prompt`, `text` or `messages` (a last assistant message "
            "is removed); in any other file, one prompt per line.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per answer: `{prompt, answer}`.")
    ] = False,
    raw: Raw = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts per batch.")] = 16,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    num_beams: Beams = 1,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Generate answers to prompts in batches.

    For a masked language model, the output is the most likely tokens for each mask token of the prompt.
    """
    values = _values(system, max_new_tokens, sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    guarded(lambda: _generate(result_dir, device, values, prompts, prompt_file, as_json, raw, batch_size))


def _values(
    system: str | None, max_new_tokens: int, sample: bool, temperature: float | None, top_p: float | None,
    top_k: int | None, num_beams: int, repetition_penalty: float, seed: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the fields of `GenerationOptions`, which is imported only when a command runs."""
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    do_sample = sample or any(value is not None for value in sampling.values())
    others = {"num_beams": num_beams, "repetition_penalty": repetition_penalty, "seed": seed, "system": system}
    return {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **sampling, **others}


def _chat(result_dir: str, device: str, values: dict[str, Any], prompt: str | None, raw: bool | None) -> None:
    _quiet()
    from finetune_cli.repl import Chat

    loaded, options = _load(result_dir, device, values, raw)
    chat = Chat(loaded, options, raw=raw)
    if prompt is None:
        chat.run()
    else:
        chat.answer(prompt)


def _generate(
    result_dir: str, device: str, values: dict[str, Any], texts: list[str], file: Path | None, as_json: bool,
    raw: bool | None, batch_size: int,
) -> None:  # fmt: skip
    _quiet()
    from finetune_cli.prompt_files import read_prompts

    prompts = read_prompts(texts, file)
    loaded, options = _load(result_dir, device, values, raw)
    # Print each batch at once, so that its answers are not lost if a later batch fails or is stopped.
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        for prompt, answer in zip(batch, _answers(loaded, options, batch, raw), strict=True):
            line = json.dumps({"prompt": prompt, **answer}, ensure_ascii=False) if as_json else answer_text(answer)
            print(line, flush=True)


def _answers(
    loaded: Loaded, options: GenerationOptions, prompts: list[Prompt], raw: bool | None
) -> Iterator[dict[str, Any]]:
    from finetune_trainer.generation.generate import generate
    from finetune_trainer.generation.mask_filling import fill

    if loaded.kind == "causal":
        yield from (
            {"answer": answer} for answer in generate(loaded, prompts, options, raw=raw, batch_size=len(prompts))
        )
        return
    for prompt in prompts:
        yield {"masks": [[vars(each) for each in candidates] for candidates in fill(loaded, str(prompt))]}


def answer_text(answer: dict[str, Any]) -> str:
    """Return an answer as text. For a masked language model: one line per mask, with probabilities."""
    if "answer" in answer:
        return str(answer["answer"])
    return "\n".join(
        ", ".join(f"{each['token']!r} {each['probability']:.3f}" for each in mask) for mask in answer["masks"]
    )


def _load(result_dir: str, device: str, values: dict[str, Any], raw: bool | None) -> tuple[Loaded, GenerationOptions]:
    from finetune_trainer.generation.load import load
    from finetune_trainer.generation.options import GenerationOptions

    options = GenerationOptions(**values)
    if sys.stderr.isatty():
        print(f"loading {result_dir} ...", file=sys.stderr)
    loaded = load(result_dir, device)
    note = form_note(loaded, raw)
    if note is not None:
        print(note, file=sys.stderr)
    return loaded, options


def form_note(loaded: Loaded, raw: bool | None) -> str | None:
    """Return a note on the prompt format if it is not the obvious one, or differs from the format of the training data.

    Raises:
        UserError: `--chat` is set and the tokenizer has no chat template.
    """
    from finetune_trainer.errors import UserError
    from finetune_trainer.form import FORMS
    from finetune_trainer.generation.prompts import form_is_plain, has_template

    if raw is False and not has_template(loaded.tokenizer):
        raise UserError("--chat: the tokenizer has no chat template")
    if loaded.form is None or not has_template(loaded.tokenizer):
        return None
    trained = f"trained on {FORMS[loaded.form]}"
    plain = form_is_plain(loaded.form)
    if raw is None:
        return f"{trained}: prompts are used without the chat template; --chat applies it" if plain else None
    used = "without" if raw else "with"
    return f"{trained}, but prompted {used} the chat template: answers may be worse" if raw != plain else None


def _quiet() -> None:
    """Set environment variables before transformers is imported: it reads them at import."""
    import torch

    from finetune_trainer.runtime import apply_environment, quiet_environment

    apply_environment(quiet_environment(accelerator=torch.accelerator.is_available()))
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it warns about optional kernels
