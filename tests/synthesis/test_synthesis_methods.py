"""The synthesis methods, item by item, with scripted teachers and real databases."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune_api.generation import Generation
from finetune_api.stages import Dedup, Evolve, Questions, SynthesizeSpec, Text2Cypher, Text2Sql
from finetune_trainer.endpoint.chat import ChatAnswer
from finetune_trainer.queries.graph_schema import SchemaError, read_schema, statements
from finetune_trainer.queries.sandbox import Sandbox, make_database
from finetune_trainer.stages.synthesize.teacher_endpoint import run_query
from finetune_trainer.synthesis import prompts, reasons
from finetune_trainer.synthesis.cleaning import EvaluationTexts, bands, decontaminated, deduplicated
from finetune_trainer.synthesis.effects import Ask, Effect, Failed, Item, Made, Outcome, Rejected, Reply
from finetune_trainer.synthesis.evolve import answer_fault, evolve_items
from finetune_trainer.synthesis.outcome import account, rows_text
from finetune_trainer.synthesis.pairs import pair_items
from finetune_trainer.synthesis.parse import Malformed, json_object
from finetune_trainer.synthesis.questions import chunks, question_items
from finetune_trainer.synthesis.scheduling import Results, run_concurrently, run_in_lockstep
from finetune_trainer.synthesis.teacher_requests import Teacher

SQL = """
CREATE TABLE singer (name TEXT PRIMARY KEY, age INTEGER, country TEXT);
INSERT INTO singer VALUES ('Ada', 31, 'Malta'), ('Bo', 45, 'Peru'), ('Cy', 27, 'Peru');
"""
CYPHER = """
CREATE NODE TABLE Movie(title STRING PRIMARY KEY, released INT64);
CREATE NODE TABLE Person(name STRING PRIMARY KEY);
CREATE REL TABLE ACTED_IN(FROM Person TO Movie);
CREATE (:Movie {title: 'A', released: 1999}), (:Person {name: 'X'});
MATCH (p:Person), (m:Movie) CREATE (p)-[:ACTED_IN]->(m);
"""
DOCUMENT = "Coral reefs grow in warm and shallow water. They are built by small animals over many centuries. "


def rules() -> ModuleType:
    """Import the example's teacher server."""
    path = Path(__file__).parents[2] / "examples" / "teacher_server.py"
    spec = importlib.util.spec_from_file_location("teacher_server", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def teacher(**fields: Any) -> Teacher:
    return Teacher("t", Generation(), **{"attempts": 3, "seed": 1, **fields})


def run(items: list[Item], say: Callable[[str], str | Failed], sandbox: Sandbox | None = None) -> list[Outcome]:
    """Return the outcomes when `say` answers the last message of each request."""

    def reply(effect: Effect) -> Reply:
        if not isinstance(effect, Ask):
            assert sandbox is not None
            return run_query(sandbox, effect.query)
        said = say(effect.request.messages[-1]["content"])
        return said if isinstance(said, Failed) else ChatAnswer(said, "stop")

    results = Results(len(items))
    run_in_lockstep(items, lambda effects: [reply(effect) for effect in effects], 3, results)
    assert results.done == results.total
    return results.in_order()


def by_rules(prompt: str) -> str:
    return str(rules().answer([{"role": "user", "content": prompt}]))


def reasons_of(outcomes: list[Outcome]) -> list[str]:
    return [outcome.reason for outcome in outcomes if isinstance(outcome, Rejected)]


def made_of(outcomes: list[Outcome]) -> list[Made]:
    return [outcome for outcome in outcomes if isinstance(outcome, Made)]


def test_every_template_has_a_version_and_fills_in() -> None:
    names = {path.stem for path in Path(prompts.__file__).parent.glob("*.txt")}
    assert names == set(prompts.VERSIONS)
    text = prompts.prompt("questions", count=2, document="{{ 7 * 7 }}")
    assert "{{ 7 * 7 }}" in text, "a document is no template"


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '```json\n{"a": 1}\n```',
        'Sure! Here it is:\n```\n{"a": 1}\n```\nAnything else?',
        '<think>{"a": 2} or not?</think>\n{"a": 1}',
        'The set {x} is: {"a": 1} as asked',
    ],
)
def test_an_object_is_found_however_it_is_wrapped(text: str) -> None:
    assert json_object(text) == {"a": 1}


@pytest.mark.parametrize("text", ["", "no", "[1]", '{"a": ', "{" * 10_000])
def test_no_object_is_malformed(text: str) -> None:
    with pytest.raises(Malformed):
        json_object(text)


def test_chunks_cover_the_document_and_overlap() -> None:
    text = "\n\n".join(f"Paragraph {number}. " + DOCUMENT * (number % 4) for number in range(30))
    pieces = list(chunks(0, text, 300, 60))
    assert all(0 < len(piece.text) <= 300 for piece in pieces)
    covered = set[int]()
    for piece in pieces:
        start = text.index(piece.text, piece.start)
        covered |= set(range(start, start + len(piece.text)))
    assert all(text[at].isspace() for at in set(range(len(text))) - covered)
    assert sum(len(piece.text) for piece in pieces) > len(text.strip())
    assert [piece.text for piece in chunks(0, "x" * 1000, 300, 0)] == ["x" * 300] * 3 + ["x" * 100]
    assert not list(chunks(0, "  \n ", 300, 60))


def questions(spec: dict[str, Any], say: Callable[[str], str | Failed], text: str = DOCUMENT) -> list[Outcome]:
    pieces = list(chunks(4, text, 2000, 0))
    return run(question_items(pieces, Questions.model_validate(spec), teacher()), say)


def test_questions_are_grounded_and_have_provenance() -> None:
    outcomes = questions({"grounding": "judge"}, by_rules)
    rows = made_of(outcomes)
    assert len(rows) == 2 and not reasons_of(outcomes)
    assert rows[0].messages[1]["content"] in DOCUMENT
    provenance = rows[0].provenance
    assert {"method", "source", "chunk", "teacher", "prompt", "request", "judged", "pair"} <= set(provenance)
    assert provenance["source"] == 4 and provenance["prompt"] == "questions/1"


def test_what_is_not_in_the_document_is_rejected() -> None:
    pairs = [
        {
            "question": "Where do reefs grow?",
            "answer": "In warm water.",
            "quote": "Coral reefs grow in WARM and\nshallow",
        },
        {"question": "How old are they?", "answer": "Ten years.", "quote": "they are ten years old"},
        {"question": "What does the document say?", "answer": "Much.", "quote": "Coral reefs grow"},
        {"question": "Who builds them?", "answer": "", "quote": "built by small animals"},
        {"question": "Too many?", "answer": "Yes.", "quote": "Coral reefs"},
    ]
    outcomes = questions({"numQuestions": 4}, lambda prompt: json.dumps({"pairs": pairs}))
    assert [row.instruction for row in made_of(outcomes)] == ["Where do reefs grow?"]
    assert reasons_of(outcomes) == [reasons.NOT_QUOTED, reasons.LEANS, reasons.EMPTY]
    judged = questions(
        {"grounding": "judge", "numQuestions": 1},
        lambda prompt: '{"supported": false}' if "judge" in prompt else json.dumps({"pairs": pairs}),
    )
    assert reasons_of(judged) == [reasons.NOT_SUPPORTED]


def test_a_malformed_answer_is_asked_for_again_and_then_given_up() -> None:
    said: list[str] = []

    def twice_wrong(prompt: str) -> str:
        said.append(prompt)
        return (
            "no"
            if len(said) < 3
            else json.dumps({"pairs": [{"question": "Q?", "answer": "A", "quote": "Coral reefs"}]})
        )

    assert len(made_of(questions({}, twice_wrong))) == 1
    assert "could not be used: it holds no JSON object" in said[1]
    outcomes = questions({}, lambda prompt: "never")
    assert reasons_of(outcomes) == [reasons.MALFORMED] and outcomes[0].example == "never"  # type: ignore[union-attr]
    gone = questions({}, lambda prompt: Failed(reasons.NO_ANSWER, "status 400"))
    assert reasons_of(gone) == [reasons.NO_ANSWER]


def evolved(say: Callable[[str], str], seeds: tuple[str, ...] = ("Name a river.",), **spec: Any) -> list[Outcome]:
    return run(evolve_items(list(enumerate(seeds)), Evolve.model_validate(spec), teacher()), say)


def test_instructions_evolve_round_by_round() -> None:
    outcomes = evolved(by_rules, numEvolutions=3, operators=["constraints", "reasoning"], includeSeeds=True)
    rows = made_of(outcomes)
    assert [row.provenance["round"] for row in rows] == [0, 1, 2, 3]
    assert all(rows[at].instruction in rows[at + 1].instruction for at in range(3)), "each from the one before"
    assert evolved(by_rules, numEvolutions=3, operators=["constraints", "reasoning"], includeSeeds=True) == outcomes
    last = evolved(by_rules, numEvolutions=3, operators=["constraints", "reasoning"], storeEvolutions=False)
    assert [row.provenance["round"] for row in made_of(last)] == [3]


def test_the_papers_eliminations() -> None:
    def say(prompt: str, **fixed: str) -> str:
        kinds = {"Task: evolve": '{"instruction": "Name a long river."}', "Task: compare": '{"equal": false}'} | fixed
        return next(
            (text for opening, text in kinds.items() if prompt.startswith(opening)), fixed.get("reply", "The Nile.")
        )

    one = {"numEvolutions": 1}
    assert len(made_of(evolved(say, **one))) == 1
    for reason, fixed in {
        reasons.NO_GAIN: {"Task: compare": '{"equal": true}'},
        reasons.COPIED: {"Task: evolve": '{"instruction": "#Rewritten Prompt#: name a river"}'},
        reasons.SORRY: {"reply": "I am sorry, I can't."},
        reasons.NOTHING_SAID: {"reply": "It is, and so they were ..."},
    }.items():
        assert reasons_of(evolved(lambda prompt, fixed=fixed: say(prompt, **fixed), **one)) == [reason]
    assert answer_fault("Sorry to say, " + "the matter is long. " * 30) is None


@pytest.mark.parametrize(
    ("method", "engine", "script"),
    [("text2sql", "sqlite", SQL), ("text2sql", "duckdb", SQL), ("text2cypher", "cypher", CYPHER)],
)
def test_only_pairs_that_run_are_kept(method: str, engine: Any, script: str, tmp_path: Path) -> None:
    make_database(engine, tmp_path / "db", script)
    database = {"cypher": script} if engine == "cypher" else {"engine": engine, "sql": script}
    values = {"numPairs": 11, "pairsPerRequest": 4, "database": database}
    spec = (Text2Cypher if engine == "cypher" else Text2Sql).model_validate(values)
    with Sandbox(engine, tmp_path / "db") as sandbox:
        items = pair_items(method, engine, sandbox.schema(2), spec, teacher())
        outcomes = run(items, by_rules, sandbox)
        assert len(items) == 3 and len(outcomes) == 11
        assert set(reasons_of(outcomes)) == {reasons.FAILS} and len(made_of(outcomes)) == 9
        for row in made_of(outcomes):
            result = sandbox.run(row.messages[-1]["content"])
            assert row.provenance["returned"]["rows"] == len(result.rows)


def test_queries_that_return_nothing_or_write_are_rejected(tmp_path: Path) -> None:
    make_database("sqlite", tmp_path / "db", SQL)
    queries = ["SELECT name FROM singer WHERE age > 99", "DELETE FROM singer", "SELECT name FROM singer", ""]
    say = json.dumps({"pairs": [{"question": f"Q{number}?", "query": query} for number, query in enumerate(queries)]})
    for require, expected in ((False, 2), (True, 1)):
        values = {"numPairs": 4, "pairsPerRequest": 4, "requireRows": require, "database": {"sql": SQL}}
        with Sandbox("sqlite", tmp_path / "db") as sandbox:
            items = pair_items("text2sql", "sqlite", "…", Text2Sql.model_validate(values), teacher())
            outcomes = run(items, lambda prompt: say, sandbox)
        assert len(made_of(outcomes)) == expected
        assert reasons.NOT_READ_ONLY in reasons_of(outcomes) and reasons.EMPTY in reasons_of(outcomes)
        assert (reasons.NO_ROWS in reasons_of(outcomes)) == require


def test_any_concurrency_gives_the_same() -> None:
    pieces = list(chunks(0, DOCUMENT * 40, 300, 50))

    def items() -> list[Item]:
        return question_items(pieces, Questions.model_validate({}), teacher())

    async def reply(effect: Effect) -> Reply:
        assert isinstance(effect, Ask)
        text = effect.request.messages[-1]["content"]
        await asyncio.sleep(len(text) % 7 / 500)
        return ChatAnswer(by_rules(text), "stop")

    found = []
    for at_once in (1, 8):
        results = Results(len(items()))
        asyncio.run(run_concurrently(items(), reply, at_once, results))
        found.append(results.in_order())
    assert found[0] == found[1] == run(items(), by_rules)


def row(text: str, answer: str = "yes") -> Made:
    return Made(({"role": "user", "content": text}, {"role": "assistant", "content": answer}), text, {}, {})


def test_duplicates_are_found_exactly_and_by_minhash() -> None:
    long = "What is the name of the longest river that flows through more than one country of the continent of Africa"
    rows = [row(long), row(long.upper() + "?!"), row(long + " today"), row("Which river is the longest one?")]
    assert reasons_of(list(deduplicated(rows, Dedup()))) == [reasons.DUPLICATE, reasons.SIMILAR]
    assert reasons_of(list(deduplicated(rows, Dedup.model_validate({"minhash": False})))) == [reasons.DUPLICATE]
    numbers = [row(f"{number} " + " ".join(f"w{number * 31 + at}" for at in range(30))) for number in range(300)]
    assert not reasons_of(list(deduplicated(numbers, Dedup())))


def test_bands_find_what_is_as_similar_as_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95):
        count = bands(threshold, 128)
        assert 128 % count == 0 and 1 - (1 - threshold ** (128 // count)) ** count >= 0.95


def test_what_evaluation_data_has_is_left_out() -> None:
    known = EvaluationTexts(["one two three four five six seven", "Who?", "SELECT a FROM b"], 5)
    rows = [
        row("zero one TWO three, four five! nine"),
        row("one two three four"),
        row("who"),
        row("Fine?", "select a from b"),
        row("Fine!"),
    ]
    outcomes = list(decontaminated(rows, known))
    assert [isinstance(outcome, Made) for outcome in outcomes] == [False, True, False, False, True]


def test_the_account_is_the_same_for_the_same_outcomes() -> None:
    spec = SynthesizeSpec.model_validate(
        {
            "evolve": {},
            "data": {"sources": [{"file": "x"}]},
            "teacher": {"endpoint": {"baseUrl": "http://x/v1", "model": "t", "promptPrice": 1.0}},
        }
    )
    outcomes: list[Outcome] = [row("a"), Rejected("why", "x" * 5000), Rejected("why", "y"), Rejected("other", "z")]
    told = account(outcomes, 2, spec, "t", [ChatAnswer("", prompt_tokens=10, completion_tokens=2)])
    assert told["rejected"] == {"why": 2, "other": 1} and told["yield"] == 0.25 and told["cost"]["price"] == 1e-5
    assert list(map(len, told["examples"]["why"])) == [2000, 1]
    assert json.loads(rows_text(outcomes)) == {"messages": [dict(one) for one in row("a").messages], "provenance": {}}


TEXT_SCHEMA = '''Node properties:
- **Movie**
  - `title`: STRING Example: "Toy ""Story"""
  - `year`: INTEGER Min: 1902, Max: 2016
  - `released`: DATE Example: "1954-01-01"
  - `tags`: LIST Min Size: 1, Max Size: 16
- **Person**
  - `name`: STRING Example: "O'Hara"
Relationship properties:
- **RATED**
  - `rating: FLOAT` Example: "2.0"
The relationships:
(:Person)-[:RATED]->(:Movie)
(:Person)-[:KNOWS]->(:Person)
'''


def test_a_graph_is_made_after_a_schema(tmp_path: Path) -> None:
    made = statements(read_schema(TEXT_SCHEMA))
    make_database("cypher", tmp_path / "db", made)
    with Sandbox("cypher", tmp_path / "db") as sandbox:
        assert "rating" in sandbox.schema(1) and "_key" not in sandbox.schema(1)
        query = "MATCH (p:Person)-[r:RATED]->(m:Movie) WHERE r.rating >= 2.0 RETURN p.name, m.title, m.year LIMIT 1"
        assert sandbox.run(query).rows[0][0] == "O'Hara"
    structured = {
        "node_props": {"Movie": [{"property": "title", "type": "STRING", "values": ["A"]}]},
        "rel_props": {},
        "relationships": [{"start": "Person", "type": "SAW", "end": "Movie"}],
    }
    assert read_schema(json.dumps(structured)) == read_schema(repr(structured))
    for bad in ("", "hello", "{", '{"a": 1}'):
        with pytest.raises(SchemaError):
            read_schema(bad)
