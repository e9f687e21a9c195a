"""Of two operators, one holds the Lease and acts, and the other one waits for it."""

from __future__ import annotations

import time
from pathlib import Path

from support.cluster.access import Access
from support.cluster.helm_chart import Installed
from support.cluster.operator_process import FAST, OperatorProcess, eventually

DURATION_SECONDS, RETRY_SECONDS = 4, 0.5
TIMES = {
    "FINETUNE_LEASE_DURATION_SECONDS": str(DURATION_SECONDS),
    "FINETUNE_LEASE_RENEW_DEADLINE_SECONDS": "3",
    "FINETUNE_LEASE_RETRY_SECONDS": str(RETRY_SECONDS),
}
TAKES = DURATION_SECONDS + 20
LEASE = "finetune-operator-twins"


def twin(release: Installed, access: Access, directory: Path, name: str) -> OperatorProcess:
    """Return an operator with a separate Lease, because the session's operator holds the chart's."""
    own = {"FINETUNE_IDENTITY": name, "FINETUNE_LEASE": LEASE, "FINETUNE_NAMESPACES": "nowhere"}
    return OperatorProcess(access, directory / name, **(release.environment | FAST | TIMES | own))


def test_the_second_waits_and_follows(release: Installed, admin: Access, tmp_path: Path) -> None:
    """The second acts after the Lease of a killed operator expires, or at once after the first was stopped."""
    one, two = (twin(release, admin, tmp_path, name) for name in ("one", "two"))
    with one:
        two._server.start(lambda: "waiting" in two.log(), timeout=30)
        try:
            assert holder(release, admin) == "one" and not two.healthy()
            one.kill()
            killed = time.monotonic()
            eventually(two.healthy, timeout=TAKES)
            assert holder(release, admin) == "two"
            assert time.monotonic() - killed > DURATION_SECONDS - 2 * RETRY_SECONDS
            one._server.start(lambda: "waiting" in one.log(), timeout=30)
        finally:
            two._server.stop()
        eventually(lambda: holder(release, admin) == "one", timeout=DURATION_SECONDS - RETRY_SECONDS)
        eventually(one.healthy, timeout=TAKES)
        assert holder(release, admin) == "one"


def test_one_that_has_lost_its_lease_ends(release: Installed, admin: Access, tmp_path: Path) -> None:
    with twin(release, admin, tmp_path, "one") as one:
        patch = '{"spec": {"holderIdentity": "somebody else"}}'
        admin.kubectl("patch", "lease", LEASE, f"--namespace={release.namespace}", "--type=merge", f"--patch={patch}")
        assert one.wait_for_death(30) and "another operator has taken Lease" in one.log()


def holder(release: Installed, admin: Access, lease: str = LEASE) -> str:
    options = [f"--namespace={release.namespace}", "--output=jsonpath={.spec.holderIdentity}"]
    return admin.kubectl("get", "lease", lease, *options).stdout
