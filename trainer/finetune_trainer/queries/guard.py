"""Check by its keywords that a query only reads. This is one of several guards: the database is read-only, too."""

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
"""A word that is not part of a name, a label, a member or a key of a map."""
_CYPHER_VERBS = {"copy", "load", "call", "create", "merge", "set", "delete", "detach", "remove", "drop"}
"""Keywords that may follow a reading clause and do more than read."""
_CYPHER_STARTS = ("match", "optional", "with", "unwind", "return")
_SQL_STARTS = ("select", "with", "values", "from", "table")


def check_cypher(query: str) -> None:
    """Check a Cypher query.

    Raises:
        QueryFailed: it is empty, has several statements, or may do more than read the graph.
    """
    words = _words(query, "cypher")
    if words[0] not in _CYPHER_STARTS:
        raise QueryFailed("not read-only", f"begins with {words[0].upper()}, expected MATCH or another reading clause")
    for word in words:
        if word in _CYPHER_VERBS:
            raise QueryFailed("not read-only", f"uses {word.upper()}, which does more than read the graph")


def check_sql(query: str) -> None:
    """Check an SQL query.

    Raises:
        QueryFailed: it is empty, has several statements, or does not begin with a reading clause.
    """
    words = _words(query, "sql", "(")
    if words[0] not in _SQL_STARTS:
        raise QueryFailed("not read-only", f"begins with {words[0].upper()}, expected SELECT or WITH")


def _words(query: str, language: str, opening: str = "") -> list[str]:
    """Return the keywords of one statement in lower case, without strings, quoted names, comments, labels, members."""
    plain = (
        _SKIPPED[language]
        .sub(lambda match: " '' " if match["quoted"] else " ", query)
        .strip()
        .rstrip(";")
        .strip()
        .lstrip(opening)
    )
    if ";" in plain:
        raise QueryFailed("invalid", "has several statements, expected one")
    words = [word.lower() for word in _WORD.findall(plain)]
    if not words:
        raise QueryFailed("invalid", "is empty")
    return words
