"""An outage of the Hub is distinguished from a missing model, immediately and in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from huggingface_hub import constants

from finetune_api.data import DataSource
from finetune_trainer import hub
from finetune_trainer.data.sources import hub_dataset
from finetune_trainer.errors import Outage, UserError
from finetune_trainer.hub import hub_access
from finetune_trainer.model.config import load_tokenizer, read_config
from finetune_trainer.model.source import ModelSource

CLOSED = "http://127.0.0.1:9"
"""No server listens on the discard port."""
MODEL = "acme/model"


class Hub(ThreadingHTTPServer):
    """A server that answers every request with one status and one of the Hub's error codes."""

    daemon_threads = True
    status = 404
    headers: dict[str, str]
    asked: list[str]

    def answers(self, status: int, **headers: str) -> None:
        self.status, self.asked = status, []
        self.headers = {f"X-{name.replace('_', '-')}": value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        body = json.dumps({"id": MODEL}).encode() if self.server.status == 200 else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Write no log to standard error."""


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Enable access to the Hub, with an empty cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that monkeypatch restores it after the code under test sets it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_outages", [])
    hub._require.cache_clear()
    yield
    hub._require.cache_clear()


@pytest.fixture
def server(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(("127.0.0.1", 0), Handler)
    found.answers(404)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def unreachable(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)


def read_everything() -> list[Exception]:
    """Return the errors of reading a model, a tokenizer and a dataset."""
    found: list[Exception] = []
    for read in (
        lambda: read_config(MODEL),
        lambda: load_tokenizer(ModelSource(MODEL, None, None, MODEL)),
        lambda: hub_dataset(DataSource(hub=MODEL), streaming=False),
    ):
        with pytest.raises((Outage, UserError)) as error:
            read()
        found.append(error.value)
    return found


def test_no_answer_is_an_outage_at_once(unreachable: None) -> None:
    started = time.monotonic()
    for error in read_everything():
        assert isinstance(error, Outage)
        assert str(error).startswith(f"{CLOSED} can't be reached: ") and "\n" not in str(error)
        assert "HF_HUB_OFFLINE=1" in str(error)
    assert time.monotonic() - started < 10, "the libraries retry for 23 s each"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_fails_is_an_outage(status: int, server: Hub) -> None:
    server.answers(status)
    assert all(isinstance(error, Outage) and str(status) in str(error) for error in read_everything())


REFUSALS: dict[str, tuple[int, dict[str, str], str]] = {
    "no such repository": (404, {"Error_Code": "RepoNotFound"}, "the hub has no {kind} acme/model, or it is private"),
    "not logged in": (401, {}, "the hub has no {kind} acme/model, or it is private"),
    "gated": (403, {"Error_Code": "GatedRepo"}, "{kind} acme/model is gated: accept its terms at http"),
    "a token that is not valid": (
        401,
        {"Error_Message": "Invalid credentials in Authorization header"},
        "does not accept",
    ),
    "forbidden": (403, {}, "access to {kind} acme/model is denied (HTTP 403)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_the_users_to_mend(case: str, server: Hub) -> None:
    status, headers, message = REFUSALS[case]
    server.answers(status, **headers)
    for error, kind in zip(read_everything(), ("model", "model", "dataset"), strict=True):
        assert isinstance(error, UserError)
        assert message.format(kind=kind) in str(error)
        assert "hf auth login" in str(error) and "kubernetes.envFromSecrets" in str(error)


def test_a_missing_revision_is_named(server: Hub) -> None:
    server.answers(404, Error_Code="RevisionNotFound")
    with pytest.raises(UserError, match="model acme/model has no revision 'v9'"):
        read_config(MODEL, "v9")
    assert server.asked == ["/api/models/acme/model/revision/v9"]


def test_what_is_no_name_is_not_asked_for(server: Hub) -> None:
    with pytest.raises(UserError, match=r"'\./nowhere' is neither a directory that exists nor an id"):
        read_config("./nowhere")
    assert not server.asked


def test_an_outage_in_the_middle_is_one_too(server: Hub) -> None:
    """The libraries raise OSError for a failed download as well as for a missing file."""
    server.answers(200)
    with pytest.raises(Outage, match="connection lost"), hub_access(MODEL, "model"):
        try:
            raise httpx2.ConnectError("connection lost")
        except httpx2.ConnectError as error:
            raise OSError("We couldn't connect to the hub to load the files") from error
    with pytest.raises(OSError, match="no such file"), hub_access(MODEL, "model"):
        raise OSError("no such file")
    assert len(server.asked) == 1, "a repository is asked for once"


def test_offline_by_choice_says_so(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        read_config(MODEL)
    message = str(error.value)
    assert "model acme/model is not in the cache" in message and "HF_HUB_OFFLINE is set" in message
    assert "hf download acme/model" in message


def cached(cache: Path, source: Path) -> None:
    """Add a model to the Hub cache, as a download does."""
    repository, commit = cache / "models--acme--model", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(source)


def test_without_an_answer_the_cache_serves(unreachable: None, llama_dir: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", llama_dir)
    started = time.monotonic()
    with hub_access(MODEL, "model"):
        assert constants.HF_HUB_OFFLINE, "so that the libraries don't retry"
    assert time.monotonic() - started < 5
    with pytest.raises(Outage), hub_access("acme/other", "model"):
        """The model is not in the cache."""


def test_validate_ends_with_one_line_and_exit_code_1(tmp_path: Path) -> None:
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "job"},
        "spec": {
            "model": {"hub": MODEL},
            "stages": [{"sft": {"data": {"sources": [{"inline": [{"text": "hello there"}]}]}, "maxLength": 64}}],
        },
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    own = {"HF_ENDPOINT": CLOSED, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-c",
        "from finetune_cli.main import main; main()",
        "validate",
        str(tmp_path / "job.yaml"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith(f"error: {CLOSED} can't be reached: ") and ended.stderr.count("\n") == 1
