"""Fixtures that render the chart with the real helm, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cluster.helm_chart import render
from support.cluster.kube_assets import MissingAsset, assets

Json = dict[str, Any]
Render = Callable[..., list[Json]]


@pytest.fixture(scope="session", autouse=True)
def helm_there() -> None:
    try:
        assets(["helm"])
    except MissingAsset as missing:
        pytest.skip(str(missing))


@pytest.fixture
def rendered(tmp_path: Path) -> Render:
    """Return a function that renders the chart's manifests with other values."""
    return lambda values=None, *options, **arguments: render(tmp_path, values, *options, **arguments)


@pytest.fixture(scope="session")
def default(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    """Return the manifests with the chart's default values."""
    return render(tmp_path_factory.mktemp("default"))
