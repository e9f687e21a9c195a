"""Check a `synthesize` stage before it sends requests to its teacher."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_api.endpoint import Endpoint
from finetune_api.problems import Problem, did_you_mean
from finetune_api.stages import SynthesizeSpec
from finetune_trainer.data.sources import locate_source
from finetune_trainer.endpoint.client import ChatClient
from finetune_trainer.errors import UserError
from finetune_trainer.synthesis.databases import open_sandbox
from finetune_trainer.synthesis.material import evaluation_texts

CONNECT_SECONDS = 20.0
CONNECT_TRIES = 5


def synthesis_problems(spec: SynthesizeSpec, where: str, base_dir: Path) -> list[Problem]:
    """Return the problems of the teacher's endpoint, the database and the evaluation data.

    Args:
        where: the stage's path, such as `stages[0].synthesize`.
    """
    problems = list(_endpoint(spec.teacher.endpoint, f"{where}.teacher.endpoint"))
    return [*problems, *_database(spec, where, base_dir), *_decontaminate(spec, where, base_dir)]


def _endpoint(endpoint: Endpoint | None, where: str) -> Iterator[Problem]:
    """Check that the API key is set, that the server answers, and that it has the model if it lists its models."""
    if endpoint is None:
        return
    try:
        names = asyncio.run(_models(endpoint, where))
    except UserError as error:
        yield from error.problems
        return
    if names and endpoint.model not in names:
        yield Problem(
            f"{where}.model", f"{endpoint.base_url} has no {endpoint.model!r}{did_you_mean(endpoint.model, names)}"
        )


async def _models(endpoint: Endpoint, where: str) -> list[str]:
    impatient = endpoint.model_copy(update={"timeout_seconds": min(endpoint.timeout_seconds, CONNECT_SECONDS)})
    async with ChatClient(impatient, where) as client:
        return await client.models(CONNECT_TRIES)


def _database(spec: SynthesizeSpec, where: str, base_dir: Path) -> Iterator[Problem]:
    pairs = spec.text2sql or spec.text2cypher
    if pairs is None:
        return
    with tempfile.TemporaryDirectory(prefix="finetune-") as scratch:
        try:
            open_sandbox(pairs.database, f"{where}.{spec.method}.database", base_dir, Path(scratch)).close()
        except UserError as error:
            yield from error.problems


def _decontaminate(spec: SynthesizeSpec, where: str, base_dir: Path) -> Iterator[Problem]:
    if spec.decontaminate is None:
        return
    at = f"{where}.decontaminate"
    found: list[Problem] = []
    for index, source in enumerate(spec.decontaminate.sources):
        try:
            locate_source(source, f"{at}.sources[{index}]", base_dir)
        except UserError as error:
            found += error.problems
    if not found:
        try:
            evaluation_texts(spec.decontaminate, at, base_dir)
        except UserError as error:
            found += error.problems
    yield from found
