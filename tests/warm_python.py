"""Python processes that need not import torch, diffusers and qvgen again: forks of one process that has.

    pytest process --- socket --- template: has imported everything, composed configurations,
          |                          | computed nothing, has one thread
          |                          | fork, twice; the process between ends at once
          +------ child <------------+     `python -m qvgen.cli ...`: by then a child of the process that asked

Most of what a short command costs is its imports, about eight seconds of a processor. :class:`WarmPopen` stands in the place
of ``subprocess.Popen`` (tests/conftest.py): where the command is Python with a module or a program of ours it is forked,
every other is started as always. A forked process has its own arguments, environment, folder, open files, session and
signals, its parent is the process that asked for it, and waiting for it and ending it is Popen's own code; product code that
starts workers notices nothing. A forked process has a template of its own for the workers that it may start.

The template is started when the first command is. Processes of pytest-xdist, which run many files, import everything before
they collect and fork their template at once (:func:`fork_template`): neither imports again what the other has.

Not as in a process that is started: what was imported before, and what libraries read from the environment while they are
imported (a command with another OMP_NUM_THREADS is started). Use ``[sys.executable, "-c", ...]`` or the console script where
that is looked at. Linux only; elsewhere every process is started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
CONSUMERS = ("adamw_8bit", "cache_dit", "comfy_export", "comfy_kitchen", "humming")
"""Programs of other people's packages. Not those whose package diffusers looks for while it is imported: torchao, SDNQ."""
PROGRAMS = [
    ROOT / "train.py",
    ROOT / "tests" / "training" / "distributed" / "context_program.py",
    ROOT / "tests" / "training" / "distributed" / "fsdp_program.py",
    ROOT / "tests" / "training" / "distributed" / "gathering_program.py",
    ROOT / "tests" / "training" / "distributed" / "host_memory_program.py",
    ROOT / "tests" / "training" / "distributed" / "shared_error_program.py",
    ROOT / "tests" / "training" / "distributed" / "world_program.py",
    ROOT / "tests" / "process_facts_program.py",
    ROOT / "tests" / "deletion" / "delete_leaves.py",
    *(ROOT / "tests" / "consumers" / f"{name}_program.py" for name in CONSUMERS),
]
"""Programs that use what commands use."""
FOLLOWER = "qvgen.config.hydra_program"
"""The module whose function a job of a launcher calls before its command."""
READER = "from qvgen.data.clip_process import serve; "
"""In the program that reads video files for qvgen.data.clip_process."""
ROOMS = ("config", "training", "data", "evaluation", "deploy", "models", "methods", "initializers", "layers", "verbs")
FURTHER = (
    "lightning.pytorch", "torch.distributed.fsdp", "diffusers.pipelines.wan.pipeline_wan", "matplotlib.figure",
    "matplotlib.backends.backend_svg",
)  # fmt: skip
"""What commands import besides all modules of qvgen."""
COMPOSED = (("train", "logger=csv"), ("ptq", "logger=csv"), ("fold",), ("export",), ("generate",))
"""Verbs and files whose configuration is composed in advance: hydra reads them for a quarter of a second."""
AT_IMPORT = ("OMP_NUM_THREADS", "PYTHONHASHSEED", "HF_HUB_CACHE", "HF_HOME", "TRITON_INTERPRET")
"""Variables that libraries read when they are imported."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SET_PARENT_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36
_MOST_FILES, _SPARE_FILE, _LENGTH_BYTES = 64, 200, 8

Request = dict[str, Any]


class Template:
    """The process that is forked, as the process sees it that wants children.

    Args:
        connection: A socket to it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self.environment = {name: os.environ.get(name) for name in AT_IMPORT}

    @classmethod
    def start(cls) -> Template:
        """Start a template that imports everything; it ends when this process does."""
        ours, its = socket.socketpair()
        process = _STARTED_POPEN(
            [sys.executable, "-m", "tests.warm_python", str(its.fileno())],
            cwd=ROOT, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()
        atexit.register(lambda: (ours.close(), process.wait()))
        return cls(ours)

    def fork(self, request: Request, files: Sequence[int]) -> int:
        """Make a child of this process and return its number.

        Linux gives an orphan to the nearest of its ancestors that asks for orphans. The process between the template and the
        child has ended when the answer comes, so this process need not ask for longer.
        """
        assert self._owner == os.getpid(), "this process was forked by something else and has no template of its own"
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(_SET_SUBREAPER, 1, 0, 0, 0)
            try:
                _send(self._connection, request, files)
                answer, _ = _receive(self._connection)
            finally:
                prctl(_SET_SUBREAPER, 0, 0, 0, 0)
        if answer is None:
            raise RuntimeError("the template of forked Python processes has ended; see the captured output")
        return int(answer["pid"])


_STARTED_POPEN = subprocess.Popen
_templates: list[Template] = []


class WarmPopen(subprocess.Popen):
    """Popen that forks commands of ours; see the module."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *further):  # fmt: skip
        """Make the child, as Popen's method of this name does.

        ``further``: startupinfo, creationflags, shell, both ends of the pipes of stdin, stdout and stderr, restore_signals,
        gid, gids, uid, umask, start_new_session, process_group.
        """
        environment, folder = dict(os.environ if env is None else env), Path(cwd or Path.cwd()).absolute()
        follows = getattr(preexec_fn, "__module__", None) == FOLLOWER
        plain = (
            not (executable or (preexec_fn and not follows))
            and close_fds
            and (*further[10:14], further[15]) == (None, None, None, -1, -1)
        )
        if not plain or not is_ours(args, environment, folder):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *further)
            return
        streams = [own if given == -1 else given for own, given in enumerate((further[3], further[6], further[8]))]
        request = {
            "words": [os.fspath(word) for word in args[1:]],
            "environment": environment,
            "folder": str(folder),
            "places": [0, 1, 2, *pass_fds],
            "session": bool(further[14]),
            "follows": follows,
            "parent": os.getpid(),
            "ignored": [int(number) for number in STOPS if signal.getsignal(number) is signal.SIG_IGN],
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }
        self.pid = _templates[0].fork(request, [*streams, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*further[3:9])


def is_ours(args: Any, environment: Mapping[str, str], folder: Path) -> bool:
    """Whether a command is Python with a module of ours, one of PROGRAMS or the reader of clips, and may be forked."""
    if not isinstance(args, list | tuple) or len(args) < 2 or args[0] != sys.executable:
        return False
    if sys.platform != "linux" or os.environ.get("OMP_NUM_THREADS") != "1":
        return False  # a template would have threads, which a fork lacks
    path = [Path(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if args[1] == "-c":
        if READER not in args[2]:
            return False
    elif args[1] == "-m":
        if not str(args[2]).startswith(("qvgen.", "tests.")):
            return False
        path.insert(0, folder)
    elif Path(args[1]) not in PROGRAMS:
        return False
    imported = next((entry for entry in path if (entry / "qvgen" / "__init__.py").is_file()), ROOT)
    if imported.resolve() != ROOT:
        return False
    if not _templates:
        _templates.append(Template.start())
    return all(environment.get(name) == value for name, value in _templates[0].environment.items())


def import_everything() -> None:
    """Import what commands import, so that they find it."""
    checkout = (str(ROOT), str(ROOT / "kernels"))  # which need not be installed
    sys.path += [entry for entry in checkout if entry not in sys.path[1:]]
    threads = len(os.listdir("/proc/self/task"))
    for room in ROOMS:
        package = importlib.import_module(f"qvgen.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in FURTHER:
        importlib.import_module(name)
    compose = importlib.import_module("qvgen.config.compose").compose_plain
    for verb, *files in COMPOSED:
        compose(verb, files, resolve=False)
    importlib.import_module("qvgen.evaluation.report.page")._templates().get_template("report.html.j2")
    leaf_file = importlib.import_module("qvgen.config.leaf_file")
    for group in importlib.import_module("qvgen.config.leaves").LEAF_GROUPS:
        leaf_file.group_targets(group)
    # A command may have other plug-ins on its path.
    importlib.import_module("qvgen.config.plugins").find_plugins.cache_clear()
    instances = importlib.import_module("hydra.core.singleton").Singleton._instances
    instances.pop(importlib.import_module("hydra.core.plugins").Plugins)
    if (found := len(os.listdir("/proc/self/task"))) != threads:
        raise RuntimeError(
            f"{found} threads run after the imports, {threads} before: a fork would have only one of them"
        )
    gc.collect()
    gc.freeze()  # pages of objects that are never looked at stay shared
    gc.set_threshold(20_000, 20, 20)  # as in tests/conftest.py, for the same reason


def fork_template() -> None:
    """Import everything and fork a template of this process, which pytest has begun and which has run no test yet."""
    if sys.platform != "linux" or os.environ.get("OMP_NUM_THREADS") != "1" or _templates:
        return
    import_everything()
    ours, its = socket.socketpair()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Python 3.12 warns of the threads of pytest-xdist, which the template never asks
        pid = os.fork()
    if pid == 0:
        forget_pytest(its.fileno())
        main(its, imported=True)
    its.close()

    def end() -> None:
        ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    atexit.register(end)
    _templates.append(Template(ours))


def forget_pytest(kept: int) -> None:
    """Give up what pytest has changed in this process: files but for ``kept``, hooks, filters of warnings, path."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    faulthandler.disable()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    sys.breakpointhook = sys.__breakpointhook__
    threading.excepthook = threading.__excepthook__
    warnings.showwarning = warnings._showwarning_orig  # type: ignore[attr-defined]
    warnings.filters[:] = [entry for entry in warnings.filters if entry[0] not in ("error", "always")]  # type: ignore[attr-defined]
    library = next(index for index, entry in enumerate(sys.path) if re.fullmatch(r"python\d+\.zip", Path(entry).name))
    sys.path[:] = ["", *sys.path[library:]]


def serve(connection: socket.socket) -> tuple[Request, list[int]]:
    """Fork a process for each request; return in such a process only, with its request and its files."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # they are meant for the processes of the command
    while True:
        request, files = _receive(connection)
        if request is None:
            os._exit(0)
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
                os._exit(0)
            os.close(read)
            os.close(write)
            connection.close()
            while os.getppid() != request["parent"]:
                time.sleep(0.0002)
            return request, files
        os.waitpid(between, 0)
        pid = int(os.read(read, 64))
        for file in (read, write, *files):
            os.close(file)
        _send(connection, {"pid": pid}, [])


def take_over(request: Request, files: Sequence[int]) -> None:
    """Give this process the session, files, streams, signals, folder, environment and path of its command."""
    if request["session"]:
        os.setsid()
    if request["follows"]:
        importlib.import_module(FOLLOWER).follow_parent()()
    spare = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _SPARE_FILE) for file in files]
    for file in files:
        os.close(file)
    for file, place in zip(spare, request["places"], strict=True):
        os.dup2(file, place)
        os.close(file)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(request["folder"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    words = request["words"]
    first = {"-m": request["folder"], "-c": ""}.get(words[0], str(Path(words[0]).parent))
    path = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*path, *(entry for entry in sys.path[1:] if entry not in {*before, *path})]
    importlib.invalidate_caches()
    sys.orig_argv = [sys.executable, *words]


def attend_to_signals(request: Request) -> None:
    """Handle signals as Python does when it starts."""
    for number in STOPS:
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def run(words: Sequence[str]) -> NoReturn:
    """Run a module or a program as the main one, and end as Python ends."""
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            sys.modules.pop(words[1], None)  # else runpy warns that it was imported
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def main(connection: socket.socket, *, imported: bool = False) -> NoReturn:
    """Be the template; in each forked process, be its command, and fork its template first."""
    if not imported:
        import_everything()
    while True:
        request, files = serve(connection)
        take_over(request, files)
        ours, connection = socket.socketpair()
        command = os.getpid()
        if os.fork():
            connection.close()
            attend_to_signals(request)
            _templates[:] = [Template(ours)]
            subprocess.Popen = WarmPopen
            run(request["words"])
        ours.close()
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != command:
            os._exit(0)
        for place in request["places"]:  # whoever reads what the command writes is not to wait for its template
            os.close(place)
        for place in range(3):
            assert os.open(os.devnull, os.O_RDWR) == place


def _send(connection: socket.socket, message: Request, files: Sequence[int]) -> None:
    content = json.dumps(message).encode()
    socket.send_fds(connection, [len(content).to_bytes(_LENGTH_BYTES, "little")], files)
    connection.sendall(content)


def _receive(connection: socket.socket) -> tuple[Request | None, list[int]]:
    head, files, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, _MOST_FILES)
    if len(head) < _LENGTH_BYTES:
        return None, files
    left, content = int.from_bytes(head, "little"), b""
    while len(content) < left:
        content += connection.recv(left - len(content))
    return json.loads(content), files


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
