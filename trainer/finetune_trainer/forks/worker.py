"""The script that Ray runs to start a worker, instead of its own `setup_worker.py`: it requests a fork.

It is run as a script, by path. It lives as long as the worker and ends with the same exit status.
"""

from __future__ import annotations

import json
import os
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def main(arguments: list[str]) -> None:
    """Start a worker.

    Args:
        arguments: those of Ray's script: two options of the script and the worker's program with its options, mixed.
    """
    from wire import (  # type: ignore[import-not-found]  # Python puts a script's folder on sys.path
        connect,
        read_number,
        send_request,
    )

    program = [item for item in arguments if not item.startswith((CONTEXT, LANGUAGE))]
    context = json.loads(next((item[len(CONTEXT) :] for item in arguments if item.startswith(CONTEXT)), "{}"))
    plain = f"{LANGUAGE}PYTHON" in arguments and program[:1] != [] and program[0].endswith("default_worker.py")
    special = context.get("command_prefix") or context.get("override_worker_entrypoint")
    connection = connect() if plain and not special else None
    if connection is None:
        _run_ray_script(arguments)
        return
    send_request(connection, program, {**os.environ, **(context.get("env_vars") or {})})
    if read_number(connection) is None:  # the server has refused the request, or died
        _run_ray_script(arguments)
        return
    status = read_number(connection)
    sys.exit(1 if status is None else status)


def _run_ray_script(arguments: list[str]) -> None:
    """Replace this process by Ray's own script."""
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    script = os.path.join(spec.submodule_search_locations[0], "_private", "workers", "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
