"""Estimate the maximum number of requests and tokens that a stage sends to its teacher."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from finetune_api.stages import SynthesizeSpec
from finetune_trainer.endpoint.chat import CHARACTERS_PER_TOKEN, MESSAGE_TOKENS
from finetune_trainer.endpoint.cost import price
from finetune_trainer.synthesis.databases import open_sandbox, schema_text
from finetune_trainer.synthesis.material import document_chunks, seeds
from finetune_trainer.synthesis.pairs import pair_requests
from finetune_trainer.synthesis.prompts import prompt


@dataclass(frozen=True)
class SynthesisPlan:
    """An upper bound of a stage's cost, with answers of maximum length and without retries of malformed answers."""

    index: int
    title: str
    method: str
    teacher: str
    items: int
    calls: int
    prompt_tokens: int
    """An estimate: four characters per token."""
    completion_tokens: int
    rows: int
    """Number of rows if none is rejected."""
    price: float | None
    """0 for a model on the job's own workers; None if the endpoint's price is unknown."""


def plan_synthesis(
    spec: SynthesizeSpec, index: int, title: str, where: str, base_dir: Path, cache_dir: Path
) -> SynthesisPlan:
    """Return the plan of a stage.

    Raises:
        UserError: its data can't be read.
    """
    items, calls, characters, rows = _counts(spec, where, base_dir, cache_dir)
    prompt_tokens = characters // CHARACTERS_PER_TOKEN + 2 * MESSAGE_TOKENS * calls
    completion_tokens = calls * spec.teacher.generation.max_new_tokens
    endpoint = spec.teacher.endpoint
    cost = 0.0 if endpoint is None else price(prompt_tokens, completion_tokens, endpoint)
    name = endpoint.model if endpoint is not None else "a local model"
    return SynthesisPlan(index, title, spec.method, name, items, calls, prompt_tokens, completion_tokens, rows, cost)


def _counts(spec: SynthesizeSpec, where: str, base_dir: Path, cache_dir: Path) -> tuple[int, int, int, int]:
    """Return the numbers of items, calls, characters of all prompts, and rows."""
    answer = spec.teacher.generation.max_new_tokens * CHARACTERS_PER_TOKEN
    if spec.questions is not None:
        pieces, count = document_chunks(spec, where, base_dir, cache_dir), spec.questions.num_questions
        text = sum(len(piece.text) for piece in pieces)
        judged = count if spec.questions.grounding == "judge" else 0
        own = (
            len(prompt("questions", document="", count=count)),
            len(prompt("grounded", document="", question="", answer="")),
        )
        characters = (
            text * (1 + judged) + len(pieces) * (own[0] + judged * own[1]) + judged * len(pieces) * answer // count
        )
        return len(pieces), len(pieces) * (1 + judged), characters, len(pieces) * count
    if spec.evolve is not None:
        found, rounds = seeds(spec, where, base_dir, cache_dir), spec.evolve.num_evolutions
        text = sum(len(seed) for _, seed in found)
        own_length = len(prompt("evolve-deepening", instruction="")) + len(prompt("gain", first="", second=""))
        seed_rows = 1 if spec.evolve.include_seeds else 0
        # Each round sends an instruction four times: to evolve it, twice to compare it, and to answer it.
        characters = rounds * (4 * text + len(found) * own_length) + seed_rows * text
        kept = (rounds if spec.evolve.store_evolutions else 1) + seed_rows
        return len(found), len(found) * (3 * rounds + seed_rows), characters, len(found) * kept
    pairs = spec.text2sql or spec.text2cypher
    assert pairs is not None
    at = f"{where}.{spec.method}.database"
    with (
        tempfile.TemporaryDirectory(prefix="finetune-") as scratch,
        open_sandbox(pairs.database, at, base_dir, Path(scratch)) as sandbox,
    ):
        schema = schema_text(pairs.database, sandbox, pairs.sample_rows, base_dir)
    calls = pair_requests(pairs)
    return calls, calls, calls * (len(schema) + 1500), pairs.num_pairs
