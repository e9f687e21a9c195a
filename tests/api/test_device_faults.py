"""Error texts of devices are classified alike for the trainer and the operator."""

from __future__ import annotations

import pytest
from support.api.device_texts import TEXTS, DeviceText

from finetune_api.device_faults import BY_KIND, DEVICE_FAULTS, FaultKind, device_fault


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_class_of_a_text(case: DeviceText) -> None:
    found = device_fault(f"{case.error}: {case.text}")
    assert (found.fault.kind if found else None) is case.kind
    if found is not None:
        assert case.advises in found.fault.advice and "\n" not in found.line


def test_every_class_has_a_text_and_a_place_in_the_order() -> None:
    assert {case.kind for case in TEXTS} - {None} == set(FaultKind)
    assert [fault.kind for fault in DEVICE_FAULTS] == list(FaultKind) == list(BY_KIND)


def test_a_cause_outweighs_what_it_causes() -> None:
    """The GPU of one worker fails, and the other workers lose their connection to it."""
    lost = next(case.text for case in TEXTS if case.kind is FaultKind.NCCL_TIMEOUT)
    broken = next(case.text for case in TEXTS if case.kind is FaultKind.GPU)
    for text in (f"{lost}\n{broken}", f"{broken}\n{lost}"):
        found = device_fault(text)
        assert found is not None and found.fault.kind is FaultKind.GPU and "ECC" in found.line


def test_advice_is_not_taken_for_an_error() -> None:
    """The operator reads the end of the driver's log, which may contain advice."""
    assert [fault.kind for fault in DEVICE_FAULTS if device_fault(fault.advice) is not None] == []
