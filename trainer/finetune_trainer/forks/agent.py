"""What Ray runs on each node in place of its dashboard's agent: it says that there is none, and stays.

The raylet waits 15 seconds for the agent's ports and then aborts, which a busy machine makes too short for the agent's
imports; this one has none to speak of. Run as a script, with the agent's arguments.
"""

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NONE = "-1"
LOOK_SECONDS = 1.0


def main(arguments):
    raylet = os.getppid()
    options = dict(item[2:].partition("=")[::2] for item in arguments if item.startswith("--"))
    for name in PORTS:
        path = f"{options['session-dir']}/{name}_{options['node-id']}"
        with open(path + ".new", "w") as file:
            file.write(NONE)
        os.replace(path + ".new", path)
    while os.getppid() == raylet:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])
