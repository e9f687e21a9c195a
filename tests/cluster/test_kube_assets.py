"""Binaries are found or built, and an error explains what to do where neither is possible."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster.kube_assets import ETCD, HELM, KUBERNETES, MissingAsset, assets


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a machine without binaries, cache and Go."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path


def test_without_binaries_and_go_the_reason_says_what_would_help(bare: Path) -> None:
    with pytest.raises(MissingAsset, match=r"no kube-apiserver here: set KUBEBUILDER_ASSETS .* or install Go"):
        assets(["kube-apiserver"])


def test_given_binaries_are_taken(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "etcd").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(bare))
    assert assets(["etcd"]) == {"etcd": bare / "etcd"}
    with pytest.raises(MissingAsset, match="kube-apiserver"):
        assets(["etcd", "kube-apiserver"])


def test_kept_builds_are_taken_without_go(bare: Path) -> None:
    ETCD.cache.mkdir(parents=True)
    (ETCD.cache / "etcd").touch()
    assert assets(["etcd"]) == {"etcd": ETCD.cache / "etcd"}


def test_a_binary_says_the_pinned_version() -> None:
    assert f"gitVersion={KUBERNETES.version}" in KUBERNETES.linker_flags
    assert f"version.version={HELM.version}" in HELM.linker_flags
    assert KUBERNETES.version in KUBERNETES.cache.name
