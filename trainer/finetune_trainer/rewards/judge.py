"""Rank the answers to a prompt with a reward model or a function."""

from __future__ import annotations

from typing import Any, Protocol

from finetune_trainer.rewards.combined import NamedReward, columns_of


class Ranks(Protocol):
    """A callable that scores the answers to each prompt; scores of different prompts need not be comparable."""

    def __call__(self, prompts: list[Any], answers: list[list[Any]], ids: list[Any], rows: list[Any]) -> list[Any]:
        """Return for each prompt a list with a number or None for each of its answers.

        Args:
            answers: for each prompt, its completions, each a string or a list of one message.
            ids: the token ids of the answers.
            rows: the columns of each prompt.
        """


class RewardJudge:
    """A ranking by a reward."""

    def __init__(self, reward: NamedReward) -> None:
        self.reward = reward

    def __call__(
        self,
        prompts: list[Any],
        answers: list[list[Any]],
        ids: list[list[list[int]]],
        rows: list[dict[str, Any]],
    ) -> list[list[float | None]]:
        """See `Ranks`."""
        flat = [(prompt, row) for prompt, group, row in zip(prompts, answers, rows, strict=True) for _ in group]
        completions, tokens = [one for group in answers for one in group], [one for group in ids for one in group]
        own = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        columns = columns_of([row for _, row in flat]) | own
        numbers = iter(self.reward([prompt for prompt, _ in flat], completions, completion_ids=tokens, **columns))
        return [[next(numbers) for _ in group] for group in answers]


def best_and_worst(scores: list[float | None]) -> tuple[int, int] | None:
    """Return the indices of the best and the worst answer, the first of equal ones; None if all scores are equal."""
    known = [(score, index) for index, score in enumerate(scores) if score is not None]
    if not known:
        return None
    best, worst = max(known, key=lambda one: (one[0], -one[1])), min(known)
    return None if best[0] == worst[0] else (best[1], worst[1])


def win_rate(pairs: list[list[float | None]]) -> list[float]:
    """Return 1, 0.5 or 0 for each (before, after) pair: after is better, equal or worse. Skip incomplete pairs."""
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return [0.5 if after == before else float(after > before) for before, after in known]


def _ignore(*_: Any) -> None:
    """Ignore what a reward function logs."""
