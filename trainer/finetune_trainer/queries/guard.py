"""Whether a query only reads, by its words: the first of several fences (the database is opened read-only, too)."""

from __future__ import annotations

import re

from finetune_trainer.queries.result import QueryFailed

_SKIPPED = {
    "cypher": re.compile(
        r"""(?P<quoted>'(?:\\.|[^'\\])*' | "(?:\\.|[^"\\])*" | `(?:``|[^`])*`) | //[^\n]* | /\*.*?\*/""", re.X | re.S
    ),
    "sql": re.compile(
        r"""(?P<quoted>'(?:''|[^'])*' | "(?:""|[^"])*" | `(?:``|[^`])*`) | --[^\n]* | /\*.*?\*/""", re.X | re.S
    ),
}
_WORD = re.compile(r"(?<![\w.:$])[A-Za-z_]+(?!\w|\s*[.:])")
"""A word that is no part of a name, no label, no member and no key of a map."""
_CYPHER_VERBS = {"copy", "load", "call", "create", "merge", "set", "delete", "detach", "remove", "drop"}
"""What may stand after a reading clause and does more than read."""
_CYPHER_STARTS = ("match", "optional", "with", "unwind", "return")
_SQL_STARTS = ("select", "with", "values", "from", "table")


def check_cypher(query: str) -> None:
    """Raises QueryFailed where a Cypher query is empty, is several, or may do anything but read the graph."""
    words = _words(query, "cypher")
    if words[0] not in _CYPHER_STARTS:
        raise QueryFailed("not read-only", f"begins with {words[0].upper()}, expected MATCH or another reading clause")
    for word in words:
        if word in _CYPHER_VERBS:
            raise QueryFailed("not read-only", f"uses {word.upper()}, which does more than read the graph")


def check_sql(query: str) -> None:
    """Raises QueryFailed where an SQL query is empty, is several, or does not begin as reading does."""
    words = _words(query, "sql", "(")
    if words[0] not in _SQL_STARTS:
        raise QueryFailed("not read-only", f"begins with {words[0].upper()}, expected SELECT or WITH")


def _words(query: str, language: str, opening: str = "") -> list[str]:
    """The bare words of one statement in lower case: no texts, no quoted names, no comments, no labels or members."""
    plain = (
        _SKIPPED[language]
        .sub(lambda match: " '' " if match["quoted"] else " ", query)
        .strip()
        .rstrip(";")
        .strip()
        .lstrip(opening)
    )
    if ";" in plain:
        raise QueryFailed("invalid", "is several statements, expected one")
    words = [word.lower() for word in _WORD.findall(plain)]
    if not words:
        raise QueryFailed("invalid", "is empty")
    return words
