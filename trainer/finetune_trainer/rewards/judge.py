"""What ranks the answers to a prompt: a reward model or a function, by their numbers."""

from __future__ import annotations

from typing import Any, Protocol

from finetune_trainer.rewards.combined import NamedReward, columns_of


class Ranks(Protocol):
    """Gives each answer to a prompt a number; answers to other prompts need not be comparable."""

    def __call__(self, prompts: list[Any], answers: list[list[Any]], ids: list[Any], rows: list[Any]) -> list[Any]:
        """For each prompt a list with a number for each of its answers, None where it has none.

        Args:
            answers: for each prompt its completions, each a string or a list of one message.
            ids: their tokens.
            rows: each prompt's columns.
        """


class RewardJudge:
    """Ranks by a reward."""

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
    """The places of the best and the worst of a prompt's answers, the first of equals; None where all are alike."""
    known = [(score, place) for place, score in enumerate(scores) if score is not None]
    if not known:
        return None
    best, worst = max(known, key=lambda one: (one[0], -one[1])), min(known)
    return None if best[0] == worst[0] else (best[1], worst[1])


def win_rate(pairs: list[list[float | None]]) -> list[float]:
    """For each (before, after) pair of scores 1 where after is better, 0.5 where they are alike, 0 where it is worse;
    pairs that lack a score are left out."""
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    return [0.5 if after == before else float(after > before) for before, after in known]


def _ignore(*_: Any) -> None:
    """A reward function's own logging."""
