"""Either kind of cluster, as tests see it."""

from __future__ import annotations

from kind_cluster import KindCluster
from one_machine import OneMachine

Cluster = OneMachine | KindCluster
