"""`chat` and `generate`: what a trained model says. The libraries load only when a command runs."""

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
        help="A job's directory (its last finished stage answers), one stage's `result`, or any saved transformers "
        "model or PEFT adapter.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of one answer.")]
Sample = Annotated[
    bool,
    typer.Option(
        "--sample", help="Draw each token by its probability. On by itself with --temperature/--top-p/--top-k."
    ),
]
Temperature = Annotated[float | None, typer.Option(help="Below 1 safer, above 1 wilder. Default: 1, when sampling.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that together reach this share.")]
TopK = Annotated[int | None, typer.Option(help="Sample among so many of the likeliest tokens.")]
Beams = Annotated[int, typer.Option(help="Beams of beam search; 1 is none.")]
Penalty = Annotated[float, typer.Option(help="Above 1, tokens that occurred become less likely; 1 is no penalty.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeat exactly. Default: new answers each time.")]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--chat",
        help="Continue texts as they stand, or ask through the chat template. Default: as the model was trained; "
        "through the chat template, if there is one, where that is not known.",
    ),
]
System = Annotated[str | None, typer.Option(help="System message put before the conversation.")]
Device = Annotated[
    str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, … `auto`: the first accelerator, else the CPU.")
]


def chat_command(
    result_dir: ResultDir,
    prompt: Annotated[str | None, typer.Option(help="Ask this alone, print the answer and leave.")] = None,
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
    """Talk with a trained model.

    It remembers the conversation; `/help` lists what else can be typed. Ctrl-C stops an answer, Ctrl-D leaves. A model
    that was trained on plain text has no turns: each line is continued on its own.
    Questions may also be piped in, one per line. Greedy (the likeliest answer) unless an option says otherwise.
    """
    values = _values(system, max_new_tokens, sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    guarded(lambda: _chat(result_dir, device, values, prompt, raw))


def generate_command(
    result_dir: ResultDir,
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="A prompt. May be given several times; `-` reads one from stdin.")
    ] = [],  # noqa: B006  # typer's form
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts from a file: `.jsonl` rows with `prompt`, `text` or `messages` (an assistant's last message "
            "is left out), or one prompt per line of any other file.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer: `{prompt, answer}`.")] = False,
    raw: Raw = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
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
    """Answer prompts with a trained model, in batches.

    A masked model instead shows the likeliest tokens for each mask token in the prompt.
    """
    values = _values(system, max_new_tokens, sample, temperature, top_p, top_k, num_beams, repetition_penalty, seed)
    guarded(lambda: _generate(result_dir, device, values, prompts, prompt_file, as_json, raw, batch_size))


def _values(
    system: str | None, max_new_tokens: int, sample: bool, temperature: float | None, top_p: float | None,
    top_k: int | None, num_beams: int, repetition_penalty: float, seed: int | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of `GenerationOptions`, which is not imported before a command runs."""
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
    result_dir: str, device: str, values: dict[str, Any], given: list[str], file: Path | None, as_json: bool,
    raw: bool | None, batch_size: int,
) -> None:  # fmt: skip
    _quiet()
    from finetune_cli.prompt_files import read_prompts

    prompts = read_prompts(given, file)
    loaded, options = _load(result_dir, device, values, raw)
    # A batch at a time, so that what is done is there when a later batch fails or is stopped.
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
    """An answer for people; of a masked model one line per mask, with probabilities."""
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
        print(f"loading {result_dir} …", file=sys.stderr)
    loaded = load(result_dir, device)
    note = form_note(loaded, raw)
    if note is not None:
        print(note, file=sys.stderr)
    return loaded, options


def form_note(loaded: Loaded, raw: bool | None) -> str | None:
    """Return how a model is asked, where that is not plain from the command: in the form that it was trained in.

    Raises:
        UserError: `--chat` without a chat template.
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
        return f"{trained}: texts are asked as they stand; --chat asks through the chat template" if plain else None
    asked = "as it stands" if raw else "through the chat template"
    return f"{trained}, but asked {asked}: the answers may be worse" if raw != plain else None


def _quiet() -> None:
    """Before the first import of transformers, which reads its environment only then."""
    import torch

    from finetune_trainer.runtime import apply_environment, quiet_environment

    apply_environment(quiet_environment(accelerator=torch.accelerator.is_available()))
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # says that optional kernels are not installed
