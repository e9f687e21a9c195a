"""A teacher to try `synthesize` without a model: a small OpenAI-compatible server that answers with fixed rules.

    python examples/teacher_server.py [PORT]

It supports only the prompts of the templates of this project. Like a model, it makes mistakes: every seventh query
refers to a column or property that does not exist.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = 8808
WRONG_EVERY = 7
HARDER = {
    "constraints": "Answer in at most {n} sentences.",
    "deepening": "Explain the causes of it as well, with {n} examples.",
    "concretizing": "Use the case of a town of {n} thousand people.",
    "reasoning": "Show the {n} steps of thought that lead to the answer.",
    "complicateInput": 'Work with these figures: {{"first": {n}, "second": {m}}}.',
}


def answer(messages: list[dict[str, str]]) -> str:
    """Return the answer to a conversation."""
    prompt = next((message["content"] for message in messages if message["role"] == "user"), "")
    for opening, rule in RULES.items():
        if prompt.startswith(opening):
            return json.dumps(rule(prompt), ensure_ascii=False)
    return f"To answer this, look at it step by step. In short: {prompt[:200]} is a matter of {_number(prompt)} parts."


def _questions(prompt: str) -> dict[str, Any]:
    wanted = int(re.search(r"Write (\d+) different", prompt)[1])  # type: ignore[index]
    sentences = [one.strip() for one in re.split(r"(?<=[.!?])\s+", _quoted(prompt)[0]) if len(one.split()) > 4]
    pairs = []
    for sentence in sentences[:wanted]:
        words = sentence.rstrip(".!?").split()
        start = " ".join(words[: max(3, len(words) // 2)])
        pairs.append({"question": f"How does it go on: «{start} …»?", "answer": sentence, "quote": sentence})
    return {"pairs": pairs}


def _grounded(prompt: str) -> dict[str, Any]:
    said = prompt.rsplit("Answer: ", 1)[1].strip()
    return {"supported": said in _quoted(prompt)[0]}


def _evolved(prompt: str) -> dict[str, Any]:
    operator = re.match(r"Task: evolve an instruction \((\w+)\)", prompt)[1]  # type: ignore[index]
    given, number = _quoted(prompt)[0], _number(prompt)
    if operator == "breadth":
        return {"instruction": f"Name {number} rare things that have to do with: {given.split('.')[0]}."}
    return {"instruction": f"{given} {HARDER[operator].format(n=number, m=number + 2)}"}


def _compared(prompt: str) -> dict[str, Any]:
    first, second = _quoted(prompt)
    return {"equal": first.split() == second.split()}


def _sql(prompt: str) -> dict[str, Any]:
    tables = re.findall(r'CREATE TABLE "?(\w+)"?\s*\(([^;]*?)\)\s*(?:;|\n|$)', _quoted(prompt)[0])
    constraint = re.compile(r"\s*(PRIMARY|FOREIGN|UNIQUE|CHECK)\b")
    parts = [(table, part) for table, inside in tables for part in inside.split(",") if not constraint.match(part)]
    columns = [(table, part.split()[0].strip('"')) for table, part in parts]
    forms = [
        ("How many different values of {c} are there in {t}?", "SELECT count(DISTINCT {c}) FROM {t}"),
        ("Which {c} comes first among {t}, in order?", "SELECT {c} FROM {t} ORDER BY {c} LIMIT 1"),
        ("How often does each {c} occur in {t}?", "SELECT {c}, count(*) FROM {t} GROUP BY {c} ORDER BY 1"),
        ("Which {c} of {t} are known?", "SELECT {c} FROM {t} WHERE {c} IS NOT NULL"),
        ("What is the greatest {c} in {t}?", "SELECT max({c}) FROM {t}"),
    ]
    return _pairs(
        prompt, [(table, column, *form) for form in forms for table, column in columns], "SELECT nothing FROM {t}"
    )


def _cypher(prompt: str) -> dict[str, Any]:
    label, properties = "", []
    for line in _quoted(prompt)[0].splitlines():
        if line.lower().startswith("relationship"):
            break
        if found := re.match(r"\s*- \*\*(.+?)\*\*", line):
            label = found[1]
        elif found := re.match(r"\s*- `(\w+)", line):
            properties.append((label, found[1]))
    forms = [
        ("How many different values of {c} does a {t} have?", "MATCH (n:{t}) RETURN count(DISTINCT n.{c})"),
        ("Which {c} comes first among all {t}?", "MATCH (n:{t}) RETURN n.{c} ORDER BY n.{c} LIMIT 1"),
        ("How often does each {c} occur among {t}?", "MATCH (n:{t}) RETURN n.{c}, count(*)"),
        ("What are a {t} with {c} connected to?", "MATCH (n:{t})--(m) WHERE n.{c} IS NOT NULL RETURN n.{c}, label(m)"),
    ]
    wrong = "MATCH (n:{t}) RETURN n.nothing_of_the_kind"
    return _pairs(prompt, [(label, name, *form) for form in forms for label, name in properties], wrong)


def _pairs(prompt: str, all_of: list[tuple[str, str, str, str]], wrong: str) -> dict[str, Any]:
    """Return the pairs of one set; every seventh pair has a wrong query."""
    wanted = int(re.search(r"Write (\d+) different", prompt)[1])  # type: ignore[index]
    number = int(re.search(r"This is set (\d+) of", prompt)[1])  # type: ignore[index]
    pairs = []
    for index in range((number - 1) * wanted, number * wanted):
        table, column, question, query = all_of[index % len(all_of)]
        query = wrong if index % WRONG_EVERY == WRONG_EVERY - 1 else query
        pairs.append({"question": question.format(t=table, c=column), "query": query.format(t=table, c=column)})
    return {"pairs": pairs}


def _quoted(prompt: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<<<\n(.*?)\n>>>", prompt, re.DOTALL)]


def _number(text: str) -> int:
    """Return a number from 2 to 9 that depends only on the text."""
    return 2 + sum(map(ord, text)) % 8


RULES = {
    "Task: write questions about a document": _questions,
    "Task: judge whether a document supports": _grounded,
    "Task: evolve an instruction": _evolved,
    "Task: compare two instructions": _compared,
    "Task: write questions on a database": _sql,
    "Task: write questions on a graph": _cypher,
}


class Handler(BaseHTTPRequestHandler):
    """`POST /v1/chat/completions` and `GET /v1/models`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "rules", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = answer(body["messages"])
        words = sum(len(message["content"].split()) for message in body["messages"])
        self._send(
            {
                "object": "chat.completion",
                "model": "rules",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": words, "completion_tokens": len(text.split())},
            }
        )

    def _send(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do not log requests."""


def main() -> None:
    """Serve until interrupted."""
    port = int(sys.argv[1]) if len(sys.argv) > 1 else PORT
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(f"a teacher by rules at http://127.0.0.1:{server.server_port}/v1, model `rules`; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")


if __name__ == "__main__":
    main()
