"""Ray's dashboard with only the two modules that KubeRay needs to submit a job and to read its state.

JobHead serves these requests; it finds the head node by data that NodeHead writes.

Each further module of the dashboard is a process of its own, with a second of CPU time and 100 MB of memory. Ray's
commands have no option to omit them. This file is run as a script, with the path of Ray's script and its arguments.
"""

import runpy
import sys

ONLY = "--modules-to-load=JobHead,NodeHead"

if __name__ == "__main__":
    path = sys.argv[1]
    sys.argv = [path, *sys.argv[2:], ONLY]
    runpy.run_path(path, run_name="__main__")
