"""Records the node of a GPU fault, as a note that the worker adds to its exception and the driver reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from finetune_api.device_faults import Retry, device_fault
from finetune_trainer.runtime import node_name

_NOTE = "GPU fault on node "


@contextmanager
def faults_with_node() -> Iterator[None]:
    """Add the name of this node to an exception that means a broken GPU.

    Other exceptions are not changed: Ray groups the workers' errors by their text and shows equal ones once.
    """
    try:
        yield
    except Exception as error:
        found = device_fault(f"{type(error).__name__}: {error}")
        if found is not None and found.fault.retry is Retry.ELSEWHERE:
            error.add_note(f"{_NOTE}{node_name()}")
        raise


def node_of(error: BaseException) -> str | None:
    """Return the name of the node on which the exception was raised, or None if it has no such note."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), None)
