"""Hydra's own part of a command: its answers about a configuration, and the jobs of a sweep through a launcher.

    qvgen train -m bits=4,3 hydra/launcher=joblib hydra.launcher.n_jobs=2

A launcher is a plug-in of Hydra (``pip install hydra-joblib-launcher``, ``hydra-submitit-launcher``, or one of your own in
the namespace ``hydra_plugins``). Through it, each job is a process tree of its own: a ``qvgen`` command with the job's
words and folder, exactly as it would be typed alone. It writes its exit code beside the others, because a launcher may run
it on another machine. Everything here is Hydra's public API: ``hydra.main``, ``HydraConfig`` and the plug-ins' own.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from qvgen.config.conf_folder import conf_directory
from qvgen.config.flags import LAUNCHER
from qvgen.config.resolvers import register_resolvers
from qvgen.config.search_path import register_folders
from qvgen.errors import UserError, did_you_mean

BUILT_IN_LAUNCHER = "basic"
"""Hydra's own, which runs one job after another as qvgen does without any."""

_PR_SET_PDEATHSIG = 1


def answer(verb: str, arguments: Sequence[str]) -> None:
    """--cfg, --info and the like: Hydra's own answers about the configuration of a verb."""
    _run(verb, arguments, lambda _: None)


def launcher_name(words: Sequence[str]) -> str | None:
    """The launcher that the words of a command ask for; None: none, or the built-in one.

    Raises:
        UserError: It is not installed.
    """
    chosen = [word.partition("=")[2] for word in words if word.partition("=")[0] == LAUNCHER]
    if words and not chosen:
        raise UserError(f"{words[0]} needs a launcher; write {LAUNCHER}=NAME")
    if not words or chosen[-1] == BUILT_IN_LAUNCHER:
        return None
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_directory())):
        known = GlobalHydra.instance().config_loader().get_group_options(LAUNCHER)
    if chosen[-1] not in known:
        raise UserError(
            f"unknown {LAUNCHER}={chosen[-1]}{did_you_mean(chosen[-1], known)} (there are: {', '.join(sorted(known))}); "
            "install the plug-in, for example hydra-joblib-launcher"
        )
    return chosen[-1]


def launch(verb: str, words: Sequence[str], commands: Sequence[Sequence[str]], *, folder: Path) -> list[int | None]:
    """Run the jobs of a sweep through a launcher.

    Args:
        verb: The verb.
        words: The words of the sweep, with those of the launcher and flags.
        commands: The words of each job alone, in the order of the sweep; begins with the verb.
        folder: Where the jobs write their exit codes; it has to be seen from wherever they run.

    Returns:
        The exit code of each job; None of one that the launcher did not bring to its end.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True)
    program = [sys.executable, "-m", "qvgen.cli"]
    python_path = os.pathsep.join(filter(None, sys.path))  # a job imports what we import
    lines = [[*program, *command] for command in commands]

    def run_one(_: Any) -> int:
        number = int(HydraConfig.get().job.num)
        return run_job(lines[number], python_path=python_path, code_file=folder / f"{number}.exit")

    own = (
        f"hydra.sweep.dir='{folder}'", "hydra.sweep.subdir=${hydra.job.num}", "hydra.output_subdir=null",
        "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job.chdir=false",
    )  # fmt: skip
    try:
        _run(verb, ["-m", *words, *own], run_one)
    except SystemExit as end:  # hydra has said what the launcher raised
        if end.code in (None, 0):
            raise
    files = [folder / f"{number}.exit" for number in range(len(commands))]
    return [int(file.read_text()) if file.is_file() else None for file in files]


def run_job(command: Sequence[str], *, python_path: str, code_file: Path) -> int:
    """Run a job's command to its end, write its exit code to a file, and return it.

    Whoever is stopped here stops the job once, which saves what it has: it is in a session of its own, so that a terminal's
    Ctrl-C does not reach it a second time, and it is asked to stop when this process dies.
    """
    environment = {**os.environ, "PYTHONPATH": python_path}
    child = subprocess.Popen(list(command), env=environment, start_new_session=True, preexec_fn=follow_parent())
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        code = child.wait()
        raise
    finally:
        code_file.write_text(str(code if child.returncode >= 0 else 128 - code))
    return code


def follow_parent() -> Callable[[], None] | None:
    """A function that a child calls before its command: it has the kernel ask it to stop when its parent dies."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return ask


def _run(verb: str, arguments: Sequence[str], task: Callable[[Any], Any]) -> None:
    """Hydra's program for a verb's configuration; raises SystemExit where it ends with a code other than 0."""
    register_resolvers()
    register_folders()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    before, sys.argv = sys.argv, [f"qvgen {verb}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name=verb)(task)()
    except SystemExit as end:  # hydra ends the process after some answers
        if end.code not in (None, 0):
            raise
    finally:
        sys.argv = before
        root.handlers[:] = handlers  # hydra's own, on the stdout of the moment, would outlive its answer
        root.setLevel(level)
