"""The process that imports the libraries and forks: `python -m finetune_trainer.forks.server DESCRIPTOR MODULE… -- …`.

The modules after the dashes need Ray, whose library reads at its import which worker it is in. All workers of a node
are alike in that, so they are imported when the first one is asked for.

A fork copies only the thread that calls it, so nothing here starts threads. A process that has opened a GPU can't be
forked: the server is for jobs on CPUs (`launch.preload`), hides the GPUs from what it imports, and ends where an import
has opened one all the same. The caller then does without it.

A fork ends with the server, and the server with whoever started it: a killed driver leaves no worker behind that would
train on beside the next attempt's. Ray's own look for its raylet lets workers live for seconds.
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

from finetune_trainer.forks.wire import take
from finetune_trainer.runtime import hush

GPU_DEVICES = "/dev/nvidia"
NO_JOB = "ffffffff"
"""What Ray calls the job of a worker that it starts before there is any."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the thread that forked it ends."""
RAY_SETTINGS = ("RAY_JOB_ID", "RAY_RAYLET_PID")
"""What Ray tells each of its workers by the environment, and Ray's library reads once, at its import."""


class ForkServer:
    """Forks a process for each request, and tells whoever asked how it ends."""

    def __init__(self, listener: socket.socket, for_workers: list[str]) -> None:
        self._listener, self._for_workers = listener, for_workers
        self._worker: list[str] | None = None
        """What Ray's library knows of the workers that are forked here, once it is imported."""
        self._asked: dict[int, socket.socket] = {}
        self._wake, self._signalled = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._signalled)

    def run(self) -> None:
        """Until whoever started it closes standard input, or ends."""
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
            request, streams = take(connection)
        except (OSError, ValueError):
            connection.close()
            return
        if not self._is_ready_for(request):
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
        self._asked[pid] = connection
        _tell(connection, pid)

    def _is_ready_for(self, request: dict[str, object]) -> bool:
        """Import what a worker needs where it is the first; another Ray's worker can't be forked here."""
        environment = request["environment"]
        assert isinstance(environment, dict)
        wanted = [environment.get(name, "") for name in RAY_SETTINGS]
        if wanted[0] == NO_JOB:
            return False
        if self._worker is None and all(wanted):
            self._worker = wanted
            os.environ.update({name: value for name, value in environment.items() if name.startswith("RAY_")})
            load(self._for_workers)
        return not any(wanted) or wanted == self._worker

    def _reap(self) -> None:
        """Several may have ended by one signal."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            connection = self._asked.pop(pid, None)
            if connection is not None:
                code = os.waitstatus_to_exitcode(status)
                _tell(connection, code if code >= 0 else 128 - code)
                connection.close()

    def _become(self, request: dict[str, object], streams: list[int]) -> NoReturn:
        """The new process: nothing of the server's is left to it but its modules."""
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._listener.close()
            for connection in self._asked.values():
                connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            argv, environment = request["argv"], request["environment"]
            assert isinstance(argv, list) and isinstance(environment, dict)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(str(request["directory"]))
            _fresh_chance()
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
    """Have the kernel kill this process when the server ends."""
    if sys.platform != "linux":
        return  # nothing like it there: a worker ends once it misses its raylet
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)  # it has ended already


def _fresh_chance() -> None:
    """What a process seeds at its start and a fork would share; `random` does so by itself."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _leave(code: int) -> NoReturn:
    """As the interpreter ends, but not into the server's own frames."""
    import atexit
    import contextlib

    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _tell(connection: socket.socket, number: int) -> None:
    try:
        connection.sendall(f"{number}\n".encode())
    except OSError:
        return  # whoever asked has gone


def opened_gpu() -> bool:
    """Whether this process holds a GPU's device open."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(entry).startswith(GPU_DEVICES):
                return True
        except OSError:
            continue
    return False


def load(modules: list[str]) -> None:
    """Import them, and let no collection touch what is shared with the forks from here on.

    bitsandbytes compiles two functions at its import, which loads all of inductor for kernels that CUDA and x86 have
    natively; here they stay as written. A fork has its own environment: what is compiled later is compiled.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    gc.disable()  # nearly nothing of an import is garbage, and looking for it takes a twentieth of the time
    for module in modules:
        if importlib.util.find_spec(module) is not None:  # a kind of stage without a module of that name is no matter
            importlib.import_module(module)
    gc.enable()
    gc.collect()
    gc.freeze()


def hide_gpus() -> None:
    """Let no library open a GPU at its import. A fork gets the environment of the process that asked for it.

    torch counts no device then, without asking the driver (`torch.cuda._device_count_nvml`), and keeps no count before
    CUDA is initialised; DeepSpeed and bitsandbytes choose what is for CPUs.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def main(listener: socket.socket, modules: list[str], for_workers: list[str]) -> None:
    """Import, then serve: whoever has asked meanwhile waits at the socket."""
    hide_gpus()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that has started this one
    hush()
    load(modules)
    if opened_gpu():
        sys.exit("a library has opened a GPU at its import: processes start without the fork server")
    if "ray" in sys.modules:
        sys.exit("one of the modules imports Ray: processes start without the fork server")
    ForkServer(listener, for_workers).run()
    os._exit(0)  # to tear the libraries down takes a second, in which the forks would work on


if __name__ == "__main__":
    _, _descriptor, *_names = sys.argv
    _cut = _names.index("--") if "--" in _names else len(_names)
    main(socket.socket(fileno=int(_descriptor)), _names[:_cut], _names[_cut + 1 :])
