"""Ray's dashboard with what KubeRay needs of it alone: to submit a job, and to ask how it stands.

The module for that finds the head by what the module of the nodes writes down.

Each further module of the dashboard is a process of its own, of a second of CPU and 100 MB. Ray's commands have no
option for that. Run as a script, with the path of Ray's own script and its arguments.
"""

import runpy
import sys

ONLY = "--modules-to-load=JobHead,NodeHead"

if __name__ == "__main__":
    path = sys.argv[1]
    sys.argv = [path, *sys.argv[2:], ONLY]
    runpy.run_path(path, run_name="__main__")
