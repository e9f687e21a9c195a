"""The trainer's image has the compiler for Triton's kernel launcher, which every loss on a GPU needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.e2e.image_root import DOCKERFILE, make_root, missing_packages, packages_of, run_inside

from finetune_trainer.doctor.programs import LAUNCHER

WHOLE = Path(__file__).with_name("triton_launcher.py")
COMPILER = ("gcc", "libc6-dev")


@pytest.fixture(scope="module")
def packages() -> list[str]:
    """Return the Debian packages of the Dockerfile's trainer stage, or skip where no root can be made."""
    pytest.importorskip("triton")
    found = packages_of("trainer")
    if why := missing_packages(found):
        pytest.skip(why)
    return found


def test_the_image_s_packages_compile_triton_s_launcher(packages: list[str], tmp_path: Path) -> None:
    """The launcher compiles, links with a stand-in of the driver's library, and loads in a root of these packages."""
    root = make_root(tmp_path / "root", packages)
    done = run_inside(root, sys.executable, "-P", str(LAUNCHER))
    assert json.loads(done.stdout)["error"] == "", done.stderr
    whole = run_inside(root, sys.executable, str(WHOLE), "/tmp")
    assert whole.returncode == 0 and whole.stdout.split()[-1] == "True", whole.stderr


def test_an_image_without_a_compiler_fails_as_triton_says(packages: list[str], tmp_path: Path) -> None:
    root = make_root(tmp_path / "root", [name for name in packages if name not in COMPILER])
    done = run_inside(root, sys.executable, "-P", str(LAUNCHER))
    assert json.loads(done.stdout)["error"] == "Failed to find C compiler." and done.returncode == 1


def test_the_dockerfile_installs_a_compiler_and_proves_it() -> None:
    """The build of the image compiles the launcher too, which also covers machines that cannot make the root."""
    assert set(COMPILER) <= set(packages_of("trainer"))
    trainer = DOCKERFILE.read_text().partition("\nFROM base AS trainer\n")[2]
    assert 'RUN ["python", "-m", "finetune_trainer.doctor.launcher"]' in trainer


def test_the_operator_s_image_has_no_compiler() -> None:
    assert packages_of("operator") == []
