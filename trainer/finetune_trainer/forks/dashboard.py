"""Ray's dashboard with what KubeRay asks of it alone: to submit a job, and how it stands.

Each further module of the dashboard is a process of its own, of a second of CPU and 100 MB. Ray's commands have no
option for that. Run as a script, with the path of Ray's own script and its arguments.
"""

import runpy
import sys

ONLY = "--modules-to-load=JobHead"

if __name__ == "__main__":
    path = sys.argv[1]
    sys.argv = [path, *sys.argv[2:], ONLY]
    runpy.run_path(path, run_name="__main__")
