"""`pvc://<claim>/<path>` URIs: paths on a PersistentVolumeClaim that the operator mounts into every pod of a job."""

from __future__ import annotations

CLAIM_SCHEME = "pvc://"
CLAIM_DIRECTORY = "/pvc"
"""Directory in a pod below which each claim is mounted, under its name."""


def mounted(uri: str) -> str:
    """Return the path in a pod of a `pvc://` URI, or any other URI or path unchanged."""
    if not uri.startswith(CLAIM_SCHEME):
        return uri
    return f"{CLAIM_DIRECTORY}/{uri.removeprefix(CLAIM_SCHEME)}"


def claim_of(uri: str) -> str | None:
    """Return the name of the claim in a `pvc://` URI, or None for any other URI."""
    if not uri.startswith(CLAIM_SCHEME):
        return None
    return uri.removeprefix(CLAIM_SCHEME).partition("/")[0]
