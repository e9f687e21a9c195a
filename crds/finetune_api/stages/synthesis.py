"""Stages that make training data with a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel, cel, exactly_one, not_exactly_one, rules
from finetune_api.data import Column, DataSource, DataSpec, StageName
from finetune_api.declaration import Produces, RowKind
from finetune_api.endpoint import Endpoint
from finetune_api.generation import Generation
from finetune_api.model import HubId, Path, Revision, Uri
from finetune_api.stages.evaluation import Database
from finetune_api.stages.non_training import BesideSpec
from finetune_api.training import PositiveInt

METHODS = ("questions", "evolve", "text2cypher", "text2sql")
GRAPH_SOURCES = ("file", "script", "cypher", "schemaFile")
Operator = Literal["constraints", "deepening", "concretizing", "reasoning", "complicateInput", "breadth"]
OPERATORS: tuple[Operator, ...] = (
    "constraints",
    "deepening",
    "concretizing",
    "reasoning",
    "complicateInput",
    "breadth",
)
Statements = Annotated[str, Field(min_length=1, max_length=262_144)]


class Questions(ApiModel):
    """Questions about documents, and their answers."""

    model_config = rules(cel("self.chunkOverlap < self.chunkSize", "chunkOverlap must be less than chunkSize"))

    num_questions: Annotated[int, Field(ge=1, le=100)] = 3
    """Pairs asked for per chunk of a document."""
    chunk_size: Annotated[int, Field(ge=100, le=10_000_000)] = 2000
    """Most characters of a chunk; it ends at a paragraph, sentence or word where it can."""
    chunk_overlap: Annotated[int, Field(ge=0, le=10_000_000)] = 200
    """Characters that a chunk repeats of the one before."""
    grounding: Literal["quote", "judge", "none"] = "quote"
    """How an answer is held to its document. `quote`: the teacher gives the words it rests on, which must be there.
    `judge`: that, and the teacher is asked whether the document says so."""
    include_document: bool = False
    """Whether the chunk is part of the made row's prompt, before the question."""

    def faults(self) -> Iterator[str]:
        if self.chunk_overlap >= self.chunk_size:
            yield f"chunkOverlap must be less than chunkSize, got {self.chunk_overlap} and {self.chunk_size}"


class Evolve(ApiModel):
    """Instructions evolved from seeds and answered (Evol-Instruct, arXiv 2304.12244)."""

    num_evolutions: Annotated[int, Field(ge=1, le=32)] = 4
    """Rounds; each evolves what the round before has left of a seed."""
    operators: Annotated[list[Operator], Field(min_length=1, max_length=6)] = Field(default=list(OPERATORS))
    """What a round may do, drawn by `seed`: five ways to make an instruction harder, and `breadth`, which makes a new
    one of the same domain."""
    store_evolutions: bool = True
    """Keep every round's instruction (true), or the last one of each seed alone (false)."""
    include_seeds: bool = False
    """Answer the seeds, too."""


class QueryPairs(ApiModel):
    """Questions and queries that answer them; every query is executed."""

    num_pairs: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Pairs asked for; fewer are left once the wrong ones are out."""
    pairs_per_request: Annotated[int, Field(ge=1, le=50)] = 5
    """Pairs asked for at once."""
    require_rows: bool = False
    """Reject queries that return no row."""
    sample_rows: Annotated[int, Field(ge=0, le=20)] = 3
    """Rows of each table, or values of each property, that the teacher and the made row's prompt show."""


class GraphDatabase(ApiModel):
    """The graph that Cypher queries run on (LadybugDB, embedded): exactly one of `file`, `script`, `cypher` and
    `schemaFile`."""

    model_config = rules(exactly_one(*GRAPH_SOURCES))

    file: Path | None = None
    """A LadybugDB database's file."""
    script: Path | None = None
    """A file of Cypher statements that make the tables and their data."""
    cypher: Statements | None = None
    """Cypher statements that make the tables and their data."""
    schema_file: Path | None = None
    """A graph's schema, as Neo4j's tools write it in text or JSON; a small graph is made up after it."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 10
    """A query that takes longer is rejected."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *GRAPH_SOURCES)


class Text2Cypher(QueryPairs):
    """Questions on a graph, and Cypher queries that answer them."""

    database: GraphDatabase
    """The graph."""


class Text2Sql(QueryPairs):
    """Questions on a database, and SQL queries that answer them."""

    model_config = rules(
        cel("self.database.engine != 'cypher'", "text2sql needs engine sqlite or duckdb: graphs are for text2cypher")
    )

    database: Database
    """The database."""

    def faults(self) -> Iterator[str]:
        if self.database.engine == "cypher":
            yield "text2sql needs engine sqlite or duckdb: graphs are for text2cypher"


class TeacherModel(ApiModel):
    """A model that answers on the job's own workers. `{}` is the one that the stage starts from."""

    model_config = rules(
        cel(
            "[has(self.stage), has(self.hub), has(self.path), has(self.uri)].filter(x, x).size() <= 1",
            "set at most one of hub, path, uri, stage",
        )
    )

    hub: HubId | None = None
    """Model id on the Hugging Face hub."""
    path: Path | None = None
    """Directory with a saved transformers model."""
    uri: Uri | None = None
    """Storage URI of such a directory."""
    stage: StageName | None = None
    """Name of an earlier stage, whose result this is."""
    revision: Revision | None = None
    """Branch, tag or commit of the hub model. Default: the repository's main branch."""
    per_device_batch_size: PositiveInt = 8
    """Prompts per worker answered at once."""

    def faults(self) -> Iterator[str]:
        names = ("hub", "path", "uri", "stage")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            yield f"set at most one of {', '.join(names)}; got {' and '.join(given)}"


class Teacher(ApiModel):
    """Who writes the data: exactly one of `endpoint` and `model`."""

    model_config = rules(exactly_one("endpoint", "model"))

    endpoint: Endpoint | None = None
    """An OpenAI-compatible server."""
    model: TeacherModel | None = None
    """A model on the job's own workers."""
    generation: Generation = Generation.model_validate({"maxNewTokens": 1024, "doSample": True})
    """How answers are generated."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "endpoint", "model")


class Dedup(ApiModel):
    """Rows that say what an earlier one says are left out: the same words always, similar ones by MinHash."""

    minhash: bool = True
    """Whether similar rows are left out, too."""
    threshold: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] = 0.8
    """Jaccard similarity of two prompts' n-grams from which the later one is left out."""
    ngram: Annotated[int, Field(ge=1, le=64)] = 3
    """Words of an n-gram."""
    num_perm: Annotated[int, Field(ge=16, le=4096)] = 128
    """Permutations of a MinHash: more are more exact."""


class Decontaminate(ApiModel):
    """Rows that share text with evaluation data are left out."""

    sources: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """The evaluation data."""
    columns: Annotated[list[Column], Field(min_length=1, max_length=64)] | None = None
    """Columns that are compared. Default: every text in a row."""
    ngram: Annotated[int, Field(ge=2, le=128)] = 13
    """Words in a row that must not be shared; a shorter text must not be shared whole."""


class SynthesizeSpec(BesideSpec):
    """Make training data with a teacher: exactly one of `questions`, `evolve`, `text2cypher` and `text2sql`. Later
    stages read it by `data.sources: [{stage: NAME}]`."""

    model_config = rules(
        exactly_one(*METHODS),
        cel(
            "has(self.data) == (has(self.questions) || has(self.evolve))",
            "questions and evolve need data, text2cypher and text2sql have none",
        ),
        cel("!has(self.data) || !self.data.streaming", "data that is synthesized from is not streamed"),
    )

    data: DataSpec | None = None
    """Documents (`text`) for `questions`, or instructions (`prompt`) for `evolve`."""
    questions: Questions | None = None
    """Question and answer pairs from documents."""
    evolve: Evolve | None = None
    """Harder and other instructions from given ones."""
    text2cypher: Text2Cypher | None = Field(default=None, alias="text2cypher")
    """Question and Cypher pairs on a graph."""
    text2sql: Text2Sql | None = Field(default=None, alias="text2sql")
    """Question and SQL pairs on a database."""
    teacher: Teacher
    """Who writes the data."""
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """How often the teacher is asked before an answer that can't be read is given up."""
    dedup: Dedup = Dedup()
    """How rows that repeat others are found."""
    decontaminate: Decontaminate | None = None
    """Evaluation data that the rows must not share text with. Default: none."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of operators and of a local teacher's sampling."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *METHODS)
        if (self.data is not None) != (self.questions is not None or self.evolve is not None):
            yield "questions and evolve need data, text2cypher and text2sql have none"
        if self.data is not None and self.data.streaming:
            yield "data that is synthesized from is not streamed"

    @property
    def row_kind(self) -> RowKind:
        return "prompt" if self.evolve is not None else "text"

    @property
    def produces(self) -> Produces:
        return "data"

    @property
    def generates(self) -> bool:
        return self.teacher.model is not None

    @property
    def method(self) -> str:
        """The member field that is set."""
        return next(name for name in METHODS if getattr(self, name) is not None)
