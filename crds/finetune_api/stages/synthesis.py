"""The `synthesize` stage: training data that a teacher generates."""

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
from finetune_api.stages.non_training import NonTrainingSpec
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
STREAMED_FAULT = "synthesize cannot read streamed data: set data.streaming: false"
Statements = Annotated[str, Field(min_length=1, max_length=262_144)]


class Questions(ApiModel):
    """Questions about documents, with answers."""

    model_config = rules(cel("self.chunkOverlap < self.chunkSize", "chunkOverlap must be less than chunkSize"))

    num_questions: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of question-answer pairs requested per chunk of a document."""
    chunk_size: Annotated[int, Field(ge=100, le=10_000_000)] = 2000
    """Maximum number of characters of a chunk. Chunks end at a paragraph, sentence or word boundary if possible."""
    chunk_overlap: Annotated[int, Field(ge=0, le=10_000_000)] = 200
    """Number of characters that a chunk repeats from the preceding one."""
    grounding: Literal["quote", "judge", "none"] = "quote"
    """How the answer is checked against its document. `quote`: the teacher quotes the supporting text, which must occur
    in the chunk. `judge`: in addition, the teacher is asked whether the document supports the answer. `none`: no
    check."""
    include_document: bool = False
    """Whether the prompt of the generated row contains the chunk, before the question."""

    def faults(self) -> Iterator[str]:
        if self.chunk_overlap >= self.chunk_size:
            yield f"chunkOverlap must be less than chunkSize, got {self.chunk_overlap} and {self.chunk_size}"


class Evolve(ApiModel):
    """Instructions that are evolved from seed instructions, with answers (Evol-Instruct, arXiv 2304.12244)."""

    num_evolutions: Annotated[int, Field(ge=1, le=32)] = 4
    """Number of rounds. Each round evolves the result of the preceding one."""
    operators: Annotated[list[Operator], Field(min_length=1, max_length=6)] = Field(default=list(OPERATORS))
    """Operations from which each round draws one by `seed`: five that make an instruction harder, and `breadth`, which
    creates a new instruction of the same domain."""
    store_evolutions: bool = True
    """true: keep the instructions of all rounds. false: keep only the last one of each seed instruction."""
    include_seeds: bool = False
    """Whether the seed instructions are answered too."""


class QueryPairs(ApiModel):
    """Questions and queries that answer them. Every query is executed."""

    num_pairs: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """Number of pairs requested. Invalid ones are removed, so the result can be smaller."""
    pairs_per_request: Annotated[int, Field(ge=1, le=50)] = 5
    """Number of pairs per request."""
    require_rows: bool = False
    """Reject queries that return no rows."""
    sample_rows: Annotated[int, Field(ge=0, le=20)] = 3
    """Number of sample rows per table, or sample values per property, in the prompts of the teacher and of the
    generated rows."""


class GraphDatabase(ApiModel):
    """The graph on which Cypher queries run (LadybugDB, embedded).

    Set exactly one of `file`, `script`, `cypher` and `schemaFile`.
    """

    model_config = rules(exactly_one(*GRAPH_SOURCES))

    file: Path | None = None
    """A LadybugDB database file."""
    script: Path | None = None
    """A file with Cypher statements that create the tables and their data."""
    cypher: Statements | None = None
    """Cypher statements that create the tables and their data."""
    schema_file: Path | None = None
    """A graph schema in the text or JSON format of Neo4j's tools. A small graph with this schema is generated."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 10
    """Timeout of a query in seconds. A query that exceeds it is rejected."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *GRAPH_SOURCES)


class Text2Cypher(QueryPairs):
    """Questions about a graph, with Cypher queries that answer them."""

    database: GraphDatabase
    """The graph database."""


class Text2Sql(QueryPairs):
    """Questions about a database, with SQL queries that answer them."""

    model_config = rules(
        cel("self.database.engine != 'cypher'", "text2sql needs engine sqlite or duckdb: use text2cypher for graphs")
    )

    database: Database
    """The database."""

    def faults(self) -> Iterator[str]:
        if self.database.engine == "cypher":
            yield "text2sql needs engine sqlite or duckdb: use text2cypher for graphs"


class TeacherModel(ApiModel):
    """A model that runs on the workers of the job. `{}`: the model that the stage starts from."""

    model_config = rules(
        cel(
            "[has(self.stage), has(self.hub), has(self.path), has(self.uri)].filter(x, x).size() <= 1",
            "set at most one of hub, path, uri, stage",
        )
    )

    hub: HubId | None = None
    """Model id on the Hugging Face Hub."""
    path: Path | None = None
    """Directory with a saved transformers model."""
    uri: Uri | None = None
    """Storage URI of a directory with a saved transformers model."""
    stage: StageName | None = None
    """Name of an earlier stage whose result is used."""
    revision: Revision | None = None
    """Branch, tag or commit of the Hub model. Default: the main branch."""
    per_device_batch_size: PositiveInt = 8
    """Prompts per worker and batch."""

    def faults(self) -> Iterator[str]:
        names = ("hub", "path", "uri", "stage")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            yield f"set at most one of {', '.join(names)}; got {' and '.join(given)}"


class Teacher(ApiModel):
    """The model that generates the data. Set exactly one of `endpoint` and `model`."""

    model_config = rules(exactly_one("endpoint", "model"))

    endpoint: Endpoint | None = None
    """An OpenAI-compatible server."""
    model: TeacherModel | None = None
    """A model that runs on the workers of the job."""
    generation: Generation = Generation.model_validate({"maxNewTokens": 1024, "doSample": True})
    """Generation of answers."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, "endpoint", "model")


class Dedup(ApiModel):
    """Removal of duplicate rows. Exact duplicates are always removed, similar rows by MinHash."""

    minhash: bool = True
    """Whether similar rows are removed too."""
    threshold: Annotated[float, Field(gt=0, le=1, json_schema_extra={"minimum": 0})] = 0.8
    """Jaccard similarity of the n-grams of two prompts from which the later row is removed."""
    ngram: Annotated[int, Field(ge=1, le=64)] = 3
    """Number of words of an n-gram."""
    num_perm: Annotated[int, Field(ge=16, le=4096)] = 128
    """Number of permutations of a MinHash. More permutations are more accurate."""


class Decontaminate(ApiModel):
    """Removal of rows that share text with evaluation data."""

    sources: Annotated[list[DataSource], Field(min_length=1, max_length=64)]
    """The evaluation data."""
    columns: Annotated[list[Column], Field(min_length=1, max_length=64)] | None = None
    """Columns to compare. Default: all texts of a row."""
    ngram: Annotated[int, Field(ge=2, le=128)] = 13
    """A row is removed if it shares this many consecutive words with the evaluation data, or a complete shorter
    text."""


class SynthesizeSpec(NonTrainingSpec):
    """Generate training data with a teacher.

    Set exactly one of `questions`, `evolve`, `text2cypher` and `text2sql`. Later stages read the data with
    `data.sources: [{stage: NAME}]`.
    """

    model_config = rules(
        exactly_one(*METHODS),
        cel(
            "has(self.data) == (has(self.questions) || has(self.evolve))",
            "questions and evolve need data; text2cypher and text2sql exclude it",
        ),
        cel("!has(self.data) || !self.data.streaming", STREAMED_FAULT),
    )

    data: DataSpec | None = None
    """Documents (column `text`) for `questions`, or seed instructions (column `prompt`) for `evolve`."""
    questions: Questions | None = None
    """Generate question-answer pairs from documents."""
    evolve: Evolve | None = None
    """Generate instructions by evolving seed instructions."""
    text2cypher: Text2Cypher | None = Field(default=None, alias="text2cypher")
    """Generate pairs of a question and a Cypher query."""
    text2sql: Text2Sql | None = Field(default=None, alias="text2sql")
    """Generate pairs of a question and an SQL query."""
    teacher: Teacher
    """The model that generates the data."""
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Maximum number of attempts to get an answer that can be parsed."""
    dedup: Dedup = Dedup()
    """Removal of duplicate rows."""
    decontaminate: Decontaminate | None = None
    """Removal of rows that share text with evaluation data. Default: none."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the drawn operations and of sampling by a local teacher."""

    def faults(self) -> Iterator[str]:
        yield from not_exactly_one(self, *METHODS)
        if (self.data is not None) != (self.questions is not None or self.evolve is not None):
            yield "questions and evolve need data; text2cypher and text2sql exclude it"
        if self.data is not None and self.data.streaming:
            yield STREAMED_FAULT

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
        """The generation method: the name of the field that is set."""
        return next(name for name in METHODS if getattr(self, name) is not None)
