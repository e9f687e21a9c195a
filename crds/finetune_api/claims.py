"""`pvc://<claim>/<path>`: a place on a PersistentVolumeClaim, which the operator mounts into every pod of a job."""

from __future__ import annotations

CLAIM_SCHEME = "pvc://"
CLAIM_DIRECTORY = "/pvc"
"""Where pods have their claims: each below it, by its own name."""


def mounted(uri: str) -> str:
    """The path in a pod that a `pvc://` URI names; any other URI or path as it is."""
    if not uri.startswith(CLAIM_SCHEME):
        return uri
    return f"{CLAIM_DIRECTORY}/{uri.removeprefix(CLAIM_SCHEME)}"


def claim_of(uri: str) -> str | None:
    """The claim that a URI names; None where it names none."""
    if not uri.startswith(CLAIM_SCHEME):
        return None
    return uri.removeprefix(CLAIM_SCHEME).partition("/")[0]
