"""Two operators side by side: one works, the other waits for its Lease."""

from __future__ import annotations

import time
from pathlib import Path

from access import Access
from helm_chart import Installed
from operator_process import FAST, OperatorProcess, eventually

from finetune_operator.leader_election import DURATION_SECONDS, LOOK_SECONDS

TAKES = DURATION_SECONDS + 2 * LOOK_SECONDS + 10
LEASE = "finetune-operator-twins"


def twin(release: Installed, access: Access, directory: Path, name: str) -> OperatorProcess:
    """With a Lease of these tests' own: the session's operator keeps the chart's."""
    own = {"FINETUNE_IDENTITY": name, "FINETUNE_LEASE": LEASE, "FINETUNE_NAMESPACES": "nowhere"}
    return OperatorProcess(access, directory / name, **(release.environment | FAST | own))


def test_the_second_waits_and_follows(release: Installed, admin: Access, tmp_path: Path) -> None:
    """Once the first has died, after as long as its hold lasts; once it has ended, at once."""
    one, two = (twin(release, admin, tmp_path, name) for name in ("one", "two"))
    with one:
        two._server.start(lambda: "waiting" in two.log(), timeout=30)
        try:
            assert holder(release, admin) == "one" and not two.healthy()
            one.kill()
            killed = time.monotonic()
            eventually(two.healthy, timeout=TAKES)
            assert holder(release, admin) == "two"
            assert time.monotonic() - killed > DURATION_SECONDS - 2 * LOOK_SECONDS
            one._server.start(lambda: "waiting" in one.log(), timeout=30)
        finally:
            two._server.stop()
        stopped = time.monotonic()
        eventually(one.healthy, timeout=TAKES)
        assert time.monotonic() - stopped < DURATION_SECONDS and holder(release, admin) == "one"


def test_one_that_has_lost_its_lease_ends(release: Installed, admin: Access, tmp_path: Path) -> None:
    with twin(release, admin, tmp_path, "one") as one:
        patch = '{"spec": {"holderIdentity": "somebody else"}}'
        admin.kubectl("patch", "lease", LEASE, f"--namespace={release.namespace}", "--type=merge", f"--patch={patch}")
        assert one.wait_for_death(30) and "has gone to another operator" in one.log()


def holder(release: Installed, admin: Access, lease: str = LEASE) -> str:
    options = [f"--namespace={release.namespace}", "--output=jsonpath={.spec.holderIdentity}"]
    return admin.kubectl("get", "lease", lease, *options).stdout
