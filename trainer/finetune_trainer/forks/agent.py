"""What Ray runs on each node in place of its dashboard's agent: it says at once at which ports the agent is.

The raylet waits 15 seconds for the agent's ports and then aborts, which a busy machine makes too short for the imports
of Ray's own agent; this script has none to speak of. Run as a script, with the path of Ray's agent and its arguments.

What it does after that depends on whether KubeRay watches the cluster (`WATCHED_VARIABLE`). If not, there is no agent:
the script stays, idle, as long as the raylet does. On KubeRay's head it becomes Ray's own agent, which starts the jobs
that KubeRay submits. On KubeRay's other nodes it answers at the agent's HTTP port that the node is well, whatever it is
asked: it lives as long as the raylet, which is what KubeRay's probes want to know.
"""

import os
import socket
import sys
import time

WATCHED_VARIABLE, HEAD = "FINETUNE_RAY_WATCHED", "head"
PORTS = {
    "metrics_agent_port": "grpc-port",
    "metrics_export_port": "metrics-export-port",
    "dashboard_agent_listen_port": "listen-port",
}
"""The option of Ray's agent for each port that the raylet waits for."""
NONE = "-1"
LOOK_SECONDS = 1.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\nConnection: close\r\n\r\nsuccess"


def main(arguments: list[str]) -> None:
    raylet = os.getppid()
    options = dict(item[2:].partition("=")[::2] for item in arguments if item.startswith("--"))
    watched = os.environ.get(WATCHED_VARIABLE)
    if watched == HEAD:
        become(arguments, options)
    tell(options, dict.fromkeys(PORTS, NONE))
    if watched:
        answer_until_alone(raylet, int(options["listen-port"]))
    while os.getppid() == raylet:
        time.sleep(LOOK_SECONDS)


def tell(options: dict[str, str], ports: dict[str, str]) -> None:
    """Write the ports to where the raylet looks for them."""
    for name, port in ports.items():
        path = f"{options['session-dir']}/{name}_{options['node-id']}"
        with open(path + ".new", "w") as file:
            file.write(port)
        os.replace(path + ".new", path)


def become(arguments: list[str], options: dict[str, str]) -> None:
    """Become Ray's own agent, at ports that the raylet knows already."""
    for option in PORTS.values():
        if options.get(option, "0") == "0":
            options[option] = str(free_port())
    tell(options, {name: options[option] for name, option in PORTS.items()})
    given = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, "-u", *(item for item in arguments if item[:2] != "--"), *given])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def answer_until_alone(raylet: int, port: int) -> None:
    """Answer requests at a port while the raylet lives."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        listener.settimeout(LOOK_SECONDS)
        while os.getppid() == raylet:
            answer(listener)


def answer(listener: socket.socket) -> None:
    """Answer the next request, or return after a while without one."""
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(LOOK_SECONDS)
            connection.recv(4096)
            connection.sendall(ANSWER)
    except OSError:  # there is no request, or the caller has gone
        return


if __name__ == "__main__":
    main(sys.argv[1:])
