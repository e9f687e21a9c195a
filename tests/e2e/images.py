"""Images without a registry: archives in docker's form, with a bare root that hostPath volumes fill."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType


def archive(
    path: Path,
    name: str,
    config: dict[str, object],
    *,
    directories: Sequence[str] = (),
    files: Mapping[str, bytes] = MappingProxyType({}),
    links: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an image of one layer.

    Args:
        config: docker's `config` of the image (Env, Cmd, Entrypoint, User).
        directories: empty ones, such as the mount points of a read-only root.
        files: contents by path; all are executable.
        links: targets of symbolic links by path.
    """
    layer = _layer(directories, files, links)
    diff = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    image = {"architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": [diff]}}
    text = json.dumps(image).encode()
    digest = hashlib.sha256(text).hexdigest()
    manifest = [{"Config": f"{digest}.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for entry, content in (
            (f"{digest}.json", text),
            ("layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            _add(tar, entry, content)
    return path


def _layer(directories: Sequence[str], files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in directories:
            entry = tarfile.TarInfo(name.strip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755
            tar.addfile(entry)
        for name, target in links.items():
            entry = tarfile.TarInfo(name.strip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for name, content in files.items():
            _add(tar, name.strip("/"), content)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))
