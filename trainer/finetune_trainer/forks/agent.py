"""What Ray runs on each node in place of its dashboard's agent: it says that there is none, and stays.

The raylet waits 15 seconds for the agent's ports and then aborts, which a busy machine makes too short for the agent's
imports; this one has none to speak of. Run as a script, with the agent's arguments.

Where KubeRay watches the cluster (`start.DASHBOARD_VARIABLE`), it answers at the agent's HTTP port that the node is
well, whatever it is asked: it lives as long as the raylet, which is what KubeRay's probes want to know.
"""

import os
import socket
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NONE = "-1"
LOOK_SECONDS = 1.0
ASKED_VARIABLE = "FINETUNE_RAY_DASHBOARD"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\nConnection: close\r\n\r\nsuccess"


def main(arguments):
    raylet = os.getppid()
    options = dict(item[2:].partition("=")[::2] for item in arguments if item.startswith("--"))
    for name in PORTS:
        path = f"{options['session-dir']}/{name}_{options['node-id']}"
        with open(path + ".new", "w") as file:
            file.write(NONE)
        os.replace(path + ".new", path)
    if os.environ.get(ASKED_VARIABLE):
        answer_until_alone(raylet, int(options["listen-port"]))
    while os.getppid() == raylet:
        time.sleep(LOOK_SECONDS)


def answer_until_alone(raylet, port):
    """Answer requests at a port while the raylet lives."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        listener.settimeout(LOOK_SECONDS)
        while os.getppid() == raylet:
            answer(listener)


def answer(listener):
    """Answer the next request, or return after a while without one."""
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(LOOK_SECONDS)
            connection.recv(4096)
            connection.sendall(ANSWER)
    except OSError:  # nobody asks, or they have gone
        return


if __name__ == "__main__":
    main(sys.argv[1:])
