"""What Ray runs to start a worker, in place of its own `setup_worker.py`: ask for a fork, and be its shadow.

Run as a script, by path. It lives as long as the worker, and ends as that does.
"""

from __future__ import annotations

import json
import os
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main(arguments: list[str]) -> None:
    """`arguments` are those of Ray's script: two options for itself, then the worker's program with its own, mixed."""
    from wire import ask, connect, line  # type: ignore[import-not-found]  # Python puts a script's folder on sys.path

    program = [item for item in arguments if not item.startswith((CONTEXT, LANGUAGE))]
    context = json.loads(next((item[len(CONTEXT) :] for item in arguments if item.startswith(CONTEXT)), "{}"))
    plain = f"{LANGUAGE}PYTHON" in arguments and program[:1] != [] and program[0].endswith("default_worker.py")
    special = context.get("command_prefix") or context.get("override_worker_entrypoint")
    connection = connect() if plain and not special else None
    if connection is None:
        _as_ray_does(arguments)
        return
    ask(connection, program, {**os.environ, **(context.get("env_vars") or {})})
    if line(connection) is None:  # it has refused, or died
        _as_ray_does(arguments)
        return
    status = line(connection)
    sys.exit(1 if status is None else status)


def _as_ray_does(arguments: list[str]) -> None:
    """Become what Ray would have run."""
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    script = os.path.join(spec.submodule_search_locations[0], "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
