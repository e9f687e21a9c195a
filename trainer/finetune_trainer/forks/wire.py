"""The protocol of the fork server: a request with the standard streams, then the process id and the exit status.

Imports only light modules of the standard library, because every process start imports it.
"""

from __future__ import annotations

import json
import os
import socket

SOCKET_VARIABLE = "FINETUNE_FORK_SERVER"
"""Path of the server's socket; unset or empty if there is no server, `OFF` if there must be none."""
OFF = "0"
MOST_BYTES = 1 << 20
STREAMS = 3


def is_off() -> bool:
    """Whether the environment switches the fork server off."""
    return os.environ.get(SOCKET_VARIABLE) == OFF


def has_server() -> bool:
    """Whether the environment names the socket of a server."""
    return os.environ.get(SOCKET_VARIABLE, "") not in ("", OFF)


def connect() -> socket.socket | None:
    """Return a connection to the server, or None if there is no server."""
    if not has_server():
        return None
    path = os.environ[SOCKET_VARIABLE]
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def send_request(connection: socket.socket, argv: list[str], environment: dict[str, str]) -> None:
    """Request a process that runs the script `argv[0]` with the standard streams and directory of this process."""
    request = {"argv": argv, "environment": environment, "directory": os.getcwd()}
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], list(range(STREAMS)))
    connection.sendall(content)


def receive_request(connection: socket.socket) -> tuple[dict[str, object], list[int]]:
    """Return a request of `send_request` and the descriptors of its standard streams.

    Raises:
        OSError, ValueError: the request is invalid.
    """
    head, streams, _, _ = socket.recv_fds(connection, 4, STREAMS)
    size = int.from_bytes(head, "big")
    if len(head) != 4 or len(streams) != STREAMS or size > MOST_BYTES:
        raise ValueError("not a request")
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise ValueError("the request is incomplete")
        content += piece
    return json.loads(content), streams


def read_number(connection: socket.socket) -> int | None:
    """Return the next number that the server sends: first the process id, then the exit status. None if it has died."""
    text = b""
    while not text.endswith(b"\n"):
        try:
            piece = connection.recv(1)
        except OSError:
            return None
        if not piece:
            return None
        text += piece
    return int(text)
