"""The settings of leader election are validated."""

from __future__ import annotations

import pytest

from finetune_operator.core.settings import from_environment

DURATION, DEADLINE, RETRY = (f"FINETUNE_LEASE_{name}_SECONDS" for name in ("DURATION", "RENEW_DEADLINE", "RETRY"))


@pytest.mark.parametrize(
    "environment",
    [{DURATION: "10"}, {DEADLINE: "15"}, {RETRY: "10"}, {RETRY: "0"}],
    ids=["duration = deadline", "deadline = duration", "retry = deadline", "no retry time"],
)
def test_an_operator_must_stop_before_another_may_take_its_lease(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"each must be greater than the next"):
        from_environment(environment)


def test_lease_times_in_order_are_accepted() -> None:
    settings = from_environment({DURATION: "5", DEADLINE: "2.5", RETRY: "0.5"})
    assert (settings.lease_duration_seconds, settings.lease_renew_deadline_seconds) == (5, 2.5)
