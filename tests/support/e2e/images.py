"""Images without a registry: archives in docker's format, made from this machine's files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[3]
OPERATOR_IMAGE, TRAINER_IMAGE, PAUSE_IMAGE = (f"finetune.test/{name}:1" for name in ("operator", "trainer", "pause"))
USERS = {
    "/etc/passwd": b"root:x:0:0::/root:/bin/sh\nfinetune:x:1000:1000::/tmp:/bin/sh\n",
    "/etc/group": b"root:x:0:\nfinetune:x:1000:\n",
}
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_UNUSED = re.compile(r"/(test|tests|idlelib|tkinter|turtledemo|site-packages|__pycache__|config-[^/]+)$")


def archive(
    path: Path,
    name: str,
    config: dict[str, object],
    *,
    directories: Sequence[str] = (),
    files: Mapping[str, bytes] = MappingProxyType({}),
    links: Mapping[str, str] = MappingProxyType({}),
    copies: Mapping[str, Path] = MappingProxyType({}),
) -> Path:
    """Write an image of one layer.

    Args:
        config: docker's `config` of the image (Env, Cmd, Entrypoint, User).
        directories: paths of empty directories, such as the mount points of a read-only root.
        files: contents by path; all are executable.
        links: targets of symbolic links by path.
        copies: files or directories of this machine by path; their modes are kept.
    """
    layer = path.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        for directory in directories:
            _add_directory(tar, directory)
        for place, target in links.items():
            entry = tarfile.TarInfo(place.strip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        for place, content in files.items():
            _add(tar, place.strip("/"), content)
        for place, source in copies.items():
            tar.add(source, place.strip("/"), filter=_as_root)
    _pack(path, name, config, layer)
    layer.unlink()
    return path


def _pack(path: Path, name: str, config: dict[str, object], layer: Path) -> None:
    with layer.open("rb") as file:
        diff = hashlib.file_digest(file, "sha256").hexdigest()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{diff}"]}
    text = json.dumps({"architecture": "amd64", "os": "linux", "config": config, "rootfs": rootfs}).encode()
    digest = hashlib.sha256(text).hexdigest()
    manifest = [{"Config": f"{digest}.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        _add(tar, f"{digest}.json", text)
        _add(tar, "manifest.json", json.dumps(manifest).encode())
        tar.add(layer, "layer.tar")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))


def _add_directory(tar: tarfile.TarFile, name: str) -> None:
    entry = tarfile.TarInfo(name.strip("/"))
    entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755
    tar.addfile(entry)


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Drop an unused file, or set its owner to root."""
    if _UNUSED.search(f"/{entry.name}") and "finetune" not in entry.name:
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def interpreter() -> Path:
    """Return the folder of this environment's base Python."""
    return Path(os.path.realpath(sys.executable)).parents[1]


def pause_image(path: Path) -> Path:
    """Build the image of the container that holds a pod's namespaces: a static program."""
    program = path.with_name("pause")
    command = ["go", "build", "-trimpath", "-buildvcs=false", "-o", str(program), "."]
    environment = os.environ | {"CGO_ENABLED": "0"}
    subprocess.run(command, cwd=Path(__file__).parent / "pause", check=True, env=environment, timeout=300)
    return archive(path, PAUSE_IMAGE, {"Entrypoint": ["/pause"]}, files={"/pause": program.read_bytes()})


def operator_image(path: Path) -> Path:
    """Build the operator's image as `images/Dockerfile` does: its locked packages, Python and C libraries.

    Python and the C libraries are those of this machine.
    """
    home = path.with_name("operator-environment")
    uv = ROOT / ".uv" / "bin" / "uv"
    options = ["--frozen", "--no-default-groups", "--extra=operator", "--no-editable", "--quiet"]
    options += ["--reinstall-package=finetune-operator"]  # otherwise an earlier build of this folder is used
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": str(home), "UV_COMPILE_BYTECODE": "0"}
    command = [str(uv), "sync", *options, f"--python={interpreter() / 'bin' / 'python3'}"]
    subprocess.run(command, cwd=ROOT, check=True, env=environment, timeout=600)
    python = interpreter()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    program, library = python / "bin" / version, python / "lib" / version
    shared = [*library.rglob("*.so"), *packages.rglob("*.so")]
    place = f"/opt/finetune/lib/{version}"
    config = {
        "Env": ["PATH=/opt/finetune/bin", "PYTHONUNBUFFERED=1", f"PYTHONPATH={place}", f"PYTHONHOME={python}"],
        "Entrypoint": [str(program), "-m", "finetune_operator.main"],
        "User": "1000:1000",
        "WorkingDir": "/tmp",
    }
    copies = {place: packages, str(program): program, str(library): library, **libraries_of([program, *shared])}
    return archive(path, OPERATOR_IMAGE, config, directories=["/tmp"], files=USERS, copies=copies)


def libraries_of(programs: Sequence[Path]) -> dict[str, Path]:
    """Return the C libraries of programs by the paths in their dynamic links."""
    done = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True)
    found = {os.path.normpath(line[1]) for line in map(_LIBRARY.search, done.stdout.splitlines()) if line}
    own = {os.path.realpath(program) for program in programs}
    return {path: Path(path).resolve() for path in sorted(found) if os.path.realpath(path) not in own}


def host_paths() -> list[str]:
    """Return the paths that the trainer's containers mount read-only: libraries, Python and its packages."""
    return ["/usr", str(interpreter()), str(ROOT)]


def trainer_image(path: Path) -> Path:
    """Build an image of only mount points, so that nothing else is available by accident.

    The packages, five gigabytes for torch alone, are mounted from the host by `trainer_volumes`.
    """
    places = [*host_paths(), "/tmp", "/cache", "/pvc", "/etc/finetune", "/etc/finetune-token", "/dev", "/proc", "/sys"]
    files = USERS | {"/etc/ld.so.cache": Path("/etc/ld.so.cache").read_bytes()}
    links = {f"/{name}": f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64") if Path(f"/{name}").is_symlink()}
    environment = [f"PATH={Path(sys.executable).parent}:/usr/bin:/bin", "LANG=C.UTF-8"]
    config = {"Env": environment, "User": "1000:1000", "WorkingDir": "/tmp"}
    return archive(path, TRAINER_IMAGE, config, directories=places, files=files, links=links)


def trainer_volumes() -> dict[str, object]:
    """Return a pod template that mounts Python and its packages into the trainer's containers."""
    volumes = {f"host-{index}": path for index, path in enumerate(host_paths())}
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in volumes.items()]
    return {
        "spec": {
            "volumes": [{"name": name, "hostPath": {"path": path}} for name, path in volumes.items()],
            "containers": [{"name": "trainer", "volumeMounts": mounts}],
        }
    }
