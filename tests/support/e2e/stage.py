"""The setup of a benchmark on a cluster: nodes, S3, the operator by helm, a namespace."""

from __future__ import annotations

import random
import tempfile
from contextlib import ExitStack
from pathlib import Path

from support.cluster.access import namespace_of
from support.cluster.helm_chart import installed
from support.cluster.kube_assets import NODE_PARTS, assets
from support.e2e.cluster_jobs import give_credentials, write_corpus
from support.e2e.faults import Victim
from support.e2e.following import Following
from support.e2e.one_machine import OneMachine
from support.e2e.operator_pod import OperatorPod, chart_values
from support.storage.s3_server import S3Server


def set_up(stack: ExitStack, chance: random.Random) -> Victim:
    """Start all parts of the setup; `stack` removes them."""
    directory = Path(tempfile.mkdtemp(prefix="finetune-bench-"))
    for name in ("cluster", "s3", "operator"):
        (directory / name).mkdir()
    cluster = stack.enter_context(OneMachine(directory / "cluster", assets(NODE_PARTS)))
    s3 = stack.enter_context(S3Server(directory / "s3", cluster.gateway))
    write_corpus(s3)
    values = chart_values(cluster)
    release = stack.enter_context(installed(cluster.admin, directory / "operator", values, "--wait", "--timeout=110s"))
    namespace = stack.enter_context(namespace_of(cluster.admin, "team"))
    give_credentials(cluster.admin, namespace, s3)
    operator = OperatorPod(cluster.admin, release.namespace)
    return Victim(cluster, cluster.admin, operator, s3, namespace, "", Following(cluster.admin, namespace, ""), chance)
