"""How a process asks the server for a fork: one request with its standard streams, one answer of two lines.

Imports nothing but the standard library's lightest: it is in the way of every start.
"""

from __future__ import annotations

import json
import os
import socket

SOCKET_VARIABLE = "FINETUNE_FORK_SERVER"
"""Where the server listens; unset where there is none."""
MOST_BYTES = 1 << 20
STREAMS = 3


def connect() -> socket.socket | None:
    """The server, or None where there is none."""
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def ask(connection: socket.socket, argv: list[str], environment: dict[str, str]) -> None:
    """Ask for a process that runs the script `argv[0]` with this process's standard streams and directory."""
    request = {"argv": argv, "environment": environment, "directory": os.getcwd()}
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], list(range(STREAMS)))
    connection.sendall(content)


def take(connection: socket.socket) -> tuple[dict[str, object], list[int]]:
    """What `ask` has sent, and the streams.

    Raises:
        OSError, ValueError: it is no request.
    """
    head, streams, _, _ = socket.recv_fds(connection, 4, STREAMS)
    size = int.from_bytes(head, "big")
    if len(head) != 4 or len(streams) != STREAMS or size > MOST_BYTES:
        raise ValueError("no request")
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise ValueError("a request that breaks off")
        content += piece
    return json.loads(content), streams


def line(connection: socket.socket) -> int | None:
    """A number that the server says: the process id first, the exit status in the end. None: the server has died."""
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
