"""Teacher model on the job's own workers, each of which generates its share of the answers."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune_api.model import ModelSpec
from finetune_api.stages import SynthesizeSpec, TeacherModel
from finetune_trainer.endpoint.chat import ChatAnswer, ChatRequest
from finetune_trainer.endpoint.journal import Journal
from finetune_trainer.errors import UserError
from finetune_trainer.generation.batches import context_of, generate_batch
from finetune_trainer.generation.load import Loaded, load, read_whole
from finetune_trainer.generation.options import GenerationOptions
from finetune_trainer.generation.prompts import encode, has_template
from finetune_trainer.model.config import load_tokenizer
from finetune_trainer.model.load import on_device
from finetune_trainer.model.source import ModelSource, model_name, stage_result
from finetune_trainer.queries.sandbox import Sandbox
from finetune_trainer.stage_graph import stage_named
from finetune_trainer.stages.synthesize.teacher_endpoint import run_query
from finetune_trainer.storage.filesystem import Storage
from finetune_trainer.synthesis import reasons
from finetune_trainer.synthesis.effects import Ask, Effect, Execute, Failed, Reply
from finetune_trainer.training.collectives import Collectives
from finetune_trainer.training.context import StageContext


def teacher_name(context: StageContext, spec: SynthesizeSpec) -> str:
    """Return the teacher's name for provenance: its Hub name, path, URI or stage."""
    given = _given(spec)
    named = given.hub or given.path or given.uri or (given.stage and f"stage:{given.stage}")
    return named or f"stage:{(context.source.name and Path(context.source.name).parent.name) or 'model'}"


class ModelTeacher:
    """A teacher whose answers come from a local model, and whose queries run in a sandbox, on all workers.

    Raises:
        UserError: the model cannot be loaded, or is not a causal language model.
    """

    def __init__(
        self, context: StageContext, spec: SynthesizeSpec, name: str, journal: Journal, sandbox: Sandbox | None
    ) -> None:
        self.batch_size = _given(spec).per_device_batch_size
        self._place, self._name, self._journal, self._sandbox = context.placement, name, journal, sandbox
        self._seed, self._options = spec.seed, GenerationOptions.of(spec.teacher.generation)
        device = f"cuda:{context.placement.local_rank}" if context.placement.accelerator else "cpu"
        self._loaded = _load(context, spec, device)
        if self._loaded.kind != "causal":
            raise UserError(f"{name}: a masked model answers nothing: a teacher continues text")

    def reply_all(self, effects: list[Effect], collectives: Collectives) -> list[Reply]:
        """Return the replies to all effects, in order. Every worker calls this with the same effects."""
        known = collectives.max([int(self._known(effect) is not None) for effect in effects])
        todo = [index for index, there in enumerate(known) if not there]
        mine = todo[self._place.rank :: self._place.world_size]
        replies: dict[int, Reply] = {
            index: answer for index, effect in enumerate(effects) if (answer := self._known(effect)) is not None
        }
        asked = [index for index in mine if isinstance(effects[index], Ask)]
        replies |= dict(zip(asked, self._answers([_request(effects[index]) for index in asked]), strict=True))
        for index in mine:
            effect = effects[index]
            if isinstance(effect, Execute):
                assert self._sandbox is not None
                replies[index] = run_query(self._sandbox, effect.query)
        everything: dict[int, Reply] = {}
        for share in collectives.gather(replies):
            everything |= share
        self._remember(effects, everything)
        return [everything[index] for index in range(len(effects))]

    def _known(self, effect: Effect) -> ChatAnswer | None:
        return self._journal.answers.get(effect.request.key(self._name)) if isinstance(effect, Ask) else None

    def _remember(self, effects: list[Effect], replies: dict[int, Reply]) -> None:
        """Add other workers' answers to this journal's memory, for the report; their own journals store them."""
        for index, effect in enumerate(effects):
            reply = replies[index]
            if isinstance(effect, Ask) and isinstance(reply, ChatAnswer):
                self._journal.answers.setdefault(effect.request.key(self._name), reply)

    def _answers(self, requests: list[ChatRequest]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        encoded = {index: self._encoded(request) for index, request in enumerate(requests)}
        context = context_of(self._loaded.model)
        for index, ids in encoded.items():
            if context is not None and len(ids) >= context:
                detail = f"a prompt of {len(ids)} tokens fills the model's context of {context}"
                replies[index] = Failed(reasons.NO_ANSWER, detail)
        todo = sorted((index for index in encoded if index not in replies), key=lambda index: len(encoded[index]))
        for first in range(0, len(todo), self.batch_size):
            batch = todo[first : first + self.batch_size]
            replies |= self._generated({index: requests[index] for index in batch}, encoded)
        return [replies[index] for index in range(len(requests))]

    def _generated(self, batch: dict[int, ChatRequest], encoded: dict[int, list[int]]) -> dict[int, Reply]:
        keys = {index: request.key(self._name) for index, request in batch.items()}
        found = generate_batch(
            self._loaded.model,
            self._loaded.tokenizer,
            [encoded[index] for index in batch],
            self._options,
            self._seed,
            keys=[int(key[:12], 16) for key in keys.values()],
        )
        replies: dict[int, Reply] = {}
        for index, completion in zip(batch, found, strict=True):
            finish = "stop" if completion.finished else "length"
            counts = len(completion.prompt), len(completion.tokens)
            answer = ChatAnswer(completion.text, finish, self._name, *counts)
            self._journal.record(keys[index], answer)
            replies[index] = answer
        self._journal.sync()
        return replies

    def _encoded(self, request: ChatRequest) -> list[int]:
        tokenizer = self._loaded.tokenizer
        if has_template(tokenizer):
            return encode(tokenizer, [[dict(message) for message in request.messages]])[0]
        return encode(tokenizer, ["\n\n".join(message["content"] for message in request.messages) + "\n\n"])[0]


def _given(spec: SynthesizeSpec) -> TeacherModel:
    assert spec.teacher.model is not None
    return spec.teacher.model


def _request(effect: Effect) -> ChatRequest:
    assert isinstance(effect, Ask)
    return effect.request


def _load(context: StageContext, spec: SynthesizeSpec, device: str) -> Loaded:
    given, run = _given(spec), context.run
    if given.stage is not None:
        return load(stage_result(run, Storage(run.root), stage_named(run, given.stage)), device)
    if given.hub is None and given.path is None and given.uri is None:
        name = context.source.name
        assert name is not None, "preflight has found that there is no model yet"
    else:
        one = ModelSpec.model_validate(
            {key: getattr(given, key) for key in ("hub", "path", "uri") if getattr(given, key)}
        )
        name = str(model_name(one, run))
    if Path(name).is_dir():
        return load(name, device)
    model, kind = read_whole(name, given.revision, device=torch.device(device))
    tokenizer = load_tokenizer(ModelSource(name, None, given.revision, tokenizer=name))
    return Loaded(on_device(model, torch.device(device)).eval(), tokenizer, kind)
