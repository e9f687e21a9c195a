"""The interface of both kinds of clusters for tests."""

from __future__ import annotations

from support.e2e.kind_cluster import KindCluster
from support.e2e.one_machine import OneMachine

Cluster = OneMachine | KindCluster
