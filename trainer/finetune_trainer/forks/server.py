"""The fork server: `python -m finetune_trainer.forks.server DESCRIPTOR MODULE... -- MODULE...`.

The modules after `--` need Ray, whose library reads the settings of its worker when it is imported. These are the same
for all workers of a node, so the server imports these modules when the first worker is requested.

A fork copies only the thread that calls it, so the server starts no threads. A process that has opened a GPU can't be
forked: the server is for jobs on CPUs (`launch.fork_imports`), hides the GPUs from its imports, and ends if an import
has opened one nevertheless. Processes then start without the server.

A fork ends with the server, and the server ends with the process that has started it: a killed driver leaves no worker
that would continue to train next to those of the next attempt. Without this, workers would live for seconds until they
notice that their raylet has ended.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from finetune_trainer.forks.wire import receive_request
from finetune_trainer.runtime import hush

GPU_DEVICES = "/dev/nvidia"
NO_JOB = "ffffffff"
"""Ray's job id of a worker that it starts before there is a job."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that a process receives when the thread that has forked it ends."""
RAY_SETTINGS = ("RAY_JOB_ID", "RAY_RAYLET_PID")
"""Environment variables of a Ray worker that Ray's library reads once, when it is imported."""


class ForkServer:
    """Forks a process for each request and sends its exit status to the client."""

    def __init__(self, listener: socket.socket, for_workers: list[str]) -> None:
        self._listener, self._for_workers = listener, for_workers
        self._worker: list[str] | None = None
        """The Ray settings of the workers that are forked here, once Ray is imported."""
        self._clients: dict[int, socket.socket] = {}
        """Connections of running forks, by process id."""
        self._wake, self._signalled = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signalled)

    def run(self) -> None:
        """Serve until the process that has started this one closes standard input or ends."""
        with selectors.DefaultSelector() as selector:
            for source in (self._listener, self._wake, sys.stdin):
                selector.register(source, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._fork()
                    elif key.fileobj is sys.stdin:
                        return
                    else:
                        os.read(self._wake, 4096)
                        self._reap()

    def _fork(self) -> None:
        connection, _ = self._listener.accept()
        try:
            request, streams = receive_request(connection)
        except (OSError, ValueError):
            connection.close()
            return
        if not self._accepts(request):
            for descriptor in (*streams, connection.detach()):
                os.close(descriptor)
            return
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _end_with(server)
            connection.close()
            self._become(request, streams)
        for stream in streams:
            os.close(stream)
        self._clients[pid] = connection
        _send(connection, pid)

    def _accepts(self, request: dict[str, object]) -> bool:
        """Whether a process can be forked here. Import the modules of workers for the first worker.

        A worker of another Ray cluster can't be forked, because Ray has been imported with other settings.
        """
        environment = request["environment"]
        assert isinstance(environment, dict)
        settings = [environment.get(name, "") for name in RAY_SETTINGS]
        if settings[0] == NO_JOB:
            return False
        if self._worker is None and all(settings):
            self._worker = settings
            os.environ.update({name: value for name, value in environment.items() if name.startswith("RAY_")})
            load(self._for_workers)
        return not any(settings) or settings == self._worker

    def _reap(self) -> None:
        """Send the exit status of all forks that have ended: several may have ended by one signal."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            connection = self._clients.pop(pid, None)
            if connection is not None:
                code = os.waitstatus_to_exitcode(status)
                _send(connection, code if code >= 0 else 128 - code)
                connection.close()

    def _become(self, request: dict[str, object], streams: list[int]) -> NoReturn:
        """Run the requested script in the forked process, which keeps only the imported modules of the server."""
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._listener.close()
            for connection in self._clients.values():
                connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            argv, environment = request["argv"], request["environment"]
            assert isinstance(argv, list) and isinstance(environment, dict)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(str(request["directory"]))
            _reseed()
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            _leave(code)


def _end_with(server: int) -> None:
    """Make the kernel kill this process when the server ends."""
    if sys.platform != "linux":
        return  # other systems have no such option: a worker ends once it notices that its raylet has ended
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)  # the server has ended already


def _reseed() -> None:
    """Reseed NumPy, whose state the forks would share; `random` reseeds itself after a fork."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _leave(code: int) -> NoReturn:
    """End the process as the interpreter does, without returning to the frames of the server."""
    import atexit
    import contextlib

    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _send(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:
        return  # the client has ended


def opened_gpu() -> bool:
    """Whether this process has a GPU device open."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith(GPU_DEVICES):
                return True
        except OSError:
            continue
    return False


def load(modules: list[str]) -> None:
    """Import modules and exempt their objects from garbage collection, so that forks keep sharing their memory.

    bitsandbytes compiles two functions when it is imported, which loads all of inductor although CUDA and x86 have
    native kernels for them. Compilation is disabled here; forks have their own environment and may compile.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    gc.disable()  # imports create nearly no garbage, and collections would take 5% of the time
    for module in modules:
        if importlib.util.find_spec(module) is not None:  # some kinds of stages have no module of that name
            importlib.import_module(module)
    gc.enable()
    gc.collect()
    gc.freeze()


def hide_gpus() -> None:
    """Keep libraries from opening a GPU when they are imported. Forks have the environment of their client.

    torch then counts no devices, without a call of the driver (`torch.cuda._device_count_nvml`), and does not cache the
    count before CUDA is initialised; DeepSpeed and bitsandbytes choose their CPU variants.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def main(listener: socket.socket, modules: list[str], for_workers: list[str]) -> None:
    """Import the modules, then serve. Requests wait in the socket until then."""
    hide_gpus()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the process that has started this one
    hush()
    load(modules)
    if opened_gpu():
        sys.exit("a library has opened a GPU when it was imported: processes start without the fork server")
    if "ray" in sys.modules:
        sys.exit("one of the modules imports Ray: processes start without the fork server")
    ForkServer(listener, for_workers).run()
    os._exit(0)  # a regular exit takes a second, in which the forks would continue to run


if __name__ == "__main__":
    _, _descriptor, *_names = sys.argv
    _cut = _names.index("--") if "--" in _names else len(_names)
    main(socket.socket(fileno=int(_descriptor)), _names[:_cut], _names[_cut + 1 :])
