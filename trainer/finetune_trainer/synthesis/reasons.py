"""The reasons of rejections, by which reports count them."""

NO_ANSWER = "the teacher gave no answer"
MALFORMED = "answer could not be read"
CUT = "answer cut off at maxNewTokens"
EMPTY = "empty text"
NOT_QUOTED = "answer rests on words that are not in the document"
NOT_SUPPORTED = "document does not say so, by the teacher's judgement"
LEANS = "question can't stand alone"
NO_GAIN = "no information gained, by the teacher's judgement"
SORRY = "answer is a short apology"
NOTHING_SAID = "answer is only punctuation and stop words"
COPIED = "instruction copies words of the evolving prompt"
FAILS = "query does not execute"
NOT_READ_ONLY = "query does more than read"
TIMEOUT = "query takes too long"
MEMORY = "query takes too much memory"
CRASH = "query kills the engine"
NO_ROWS = "query returns no row"
CONTAMINATED = "shares text with evaluation data"
DUPLICATE = "same prompt as an earlier row"
SIMILAR = "prompt similar to an earlier row's"
OF_FAILURE = {
    "invalid": FAILS,
    "not read-only": NOT_READ_ONLY,
    "timeout": TIMEOUT,
    "memory": MEMORY,
    "crash": CRASH,
}
"""The reason for each `FailureKind` of a query."""
