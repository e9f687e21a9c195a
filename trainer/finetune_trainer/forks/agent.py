"""The script that Ray runs on each node instead of its dashboard agent: it announces the agent's ports at once.

The raylet waits 15 seconds for the agent's ports and then aborts. On a busy machine the imports of Ray's own agent take
longer; this script imports little. It is run as a script, with the path of Ray's agent and its arguments.

If KubeRay does not manage the cluster (`WATCHED_VARIABLE`), no agent is needed: the script idles until the raylet ends.
On KubeRay's head node it becomes Ray's own agent, which starts the jobs that KubeRay submits. On KubeRay's other nodes
it answers all requests at the agent's HTTP port with success while the raylet lives, which is what KubeRay's probes
check.
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
POLL_SECONDS = 1.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\nConnection: close\r\n\r\nsuccess"


def main(arguments: list[str]) -> None:
    raylet = os.getppid()
    options = dict(item[2:].partition("=")[::2] for item in arguments if item.startswith("--"))
    watched = os.environ.get(WATCHED_VARIABLE)
    if watched == HEAD:
        run_ray_agent(arguments, options)
    write_ports(options, dict.fromkeys(PORTS, NONE))
    if watched:
        serve_probes(raylet, int(options["listen-port"]))
    while os.getppid() == raylet:
        time.sleep(POLL_SECONDS)


def write_ports(options: dict[str, str], ports: dict[str, str]) -> None:
    """Write the ports to the files that the raylet reads."""
    for name, port in ports.items():
        path = f"{options['session-dir']}/{name}_{options['node-id']}"
        with open(path + ".new", "w") as file:
            file.write(port)
        os.replace(path + ".new", path)


def run_ray_agent(arguments: list[str], options: dict[str, str]) -> None:
    """Replace this process by Ray's own agent, with ports that are announced before."""
    for option in PORTS.values():
        if options.get(option, "0") == "0":
            options[option] = str(free_port())
    write_ports(options, {name: options[option] for name, option in PORTS.items()})
    own = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, "-u", *(item for item in arguments if item[:2] != "--"), *own])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def serve_probes(raylet: int, port: int) -> None:
    """Answer requests at a port until the raylet ends."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.listen()
        listener.settimeout(POLL_SECONDS)
        while os.getppid() == raylet:
            answer(listener)


def answer(listener: socket.socket) -> None:
    """Answer the next request, or return after a timeout."""
    try:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(POLL_SECONDS)
            connection.recv(4096)
            connection.sendall(ANSWER)
    except OSError:  # a timeout, or the client has disconnected
        return


if __name__ == "__main__":
    main(sys.argv[1:])
