"""`qvgen VERB key=value...`: from the command line to one call of ``qvgen.verbs.VERB.run(config)`` for each job.

A verb is a file in qvgen/verbs with a conf/VERB.yaml; it receives the frozen dataclass of qvgen.config.schema.train that is
named after it. Every job of a --multirun is composed and checked before the first one starts.

Exit codes: 0 all that was asked is done; 3 a dry run that does not fit; 2 bad input or environment (one line on stderr;
the traceback too with debug=true or HYDRA_FULL_ERROR=1); 1 a bug (traceback); 130 after SIGINT, 143 after SIGTERM or
SIGUSR1, with what is saved and the command that continues on one line (:mod:`qvgen.stop_request`). Of several jobs the
worst counts.

What is the user's to mend is told from a bug by its type: ValueError and OSError are, and so is a RuntimeError that
our own code raises (it names what is wrong with the environment). A RuntimeError from inside torch is a bug.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from qvgen import __version__, stop_request, work_item
from qvgen.config.command_line import begin_job, command_line
from qvgen.config.conf_folder import using_directory
from qvgen.config.processes import launched_world
from qvgen.errors import DOES_NOT_FIT, UserError, did_you_mean, is_ours, missing_library, one_line
from qvgen.verbs import import_verb, import_worker

DONE, BUG, BAD_INPUT = 0, 1, 2
INTERRUPTED, TERMINATED = stop_request.INTERRUPTED, stop_request.TERMINATED
_SEVERITY = (DONE, DOES_NOT_FIT, BAD_INPUT, BUG, INTERRUPTED, TERMINATED)
_SHARING_VERBS, _READING_VERBS = ("precompute", "evaluate"), ("dashboard", "doctor", "inspect")
"""Verbs whose tasks share out clips and videos, whoever started them; those that do no work. Tasks of a launcher would do
that of any other one several times."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, ``sys.argv[1:]`` by default, and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show = os.environ.get("HYDRA_FULL_ERROR") == "1" or any(a.lower() == "debug=true" for a in arguments)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(_overview())
        return DONE
    if first == "--version":
        print(f"qvgen {__version__}")
        return DONE
    if first == "worker":
        return _guarded(lambda: _worker(arguments[1:]), name="worker", show_traceback=True)
    begin_job(first, arguments[1:])
    with stop_request.listening():
        return _guarded(lambda: _run_verb(first, arguments[1:], show=show), name=first, show_traceback=show)


def verb_files() -> dict[str, Path]:
    """Verb -> its module's file."""
    files = sorted((Path(__file__).parent / "verbs").glob("[a-z]*.py"))
    return {file.stem.removesuffix("_").replace("_", "-"): file for file in files}


def verbs() -> dict[str, str]:
    """Verb -> the first line of its module's docstring, without importing it."""
    trees = {verb: ast.parse(file.read_text(encoding="utf-8")) for verb, file in verb_files().items()}
    return {verb: (ast.get_docstring(tree) or "").partition("\n")[0] for verb, tree in trees.items()}


def _overview() -> str:
    known = verbs()
    width = max(map(len, known), default=0)
    return "\n".join(
        [
            "qvgen VERB key=value...\n",
            *(f"  {verb:<{width}}  {line}" for verb, line in known.items()),
            "\nqvgen VERB --help       all keys, groups and options of a verb",
            "qvgen VERB --cfg job    the configuration that it would run with",
            "qvgen VERB -m bits=4,3  one job for each value",
        ]
    )


def _run_verb(verb: str, arguments: list[str], *, show: bool) -> int:
    """Run a verb's command line; return the worst exit code of its jobs."""
    if verb not in (known := verb_files()):
        raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, known)} (there are: {', '.join(known)})")
    _own_the_environment(verb)
    if (world := launched_world.current()) is None or verb != "train":
        return _read_and_run(verb, arguments, show=show)
    from qvgen.verbs._launched import check_devices, follow, lead

    def run() -> int:
        check_devices(world)
        return _read_and_run(verb, arguments, show=show)

    return follow(world, run) if world.rank else lead(world, lambda: _guarded(run, name=verb, show_traceback=show))


def _read_and_run(verb: str, arguments: list[str], *, show: bool) -> int:
    from qvgen.config.flags import parse_flags
    from qvgen.config.positional import name_positionals

    arguments = name_positionals(verb, arguments)
    flags = parse_flags(arguments)
    with using_directory(Path(flags.config_dir) if flags.config_dir else None):
        return _run_jobs(verb, arguments, flags, show=show)


def _run_jobs(verb: str, arguments: list[str], flags: Namespace, *, show: bool) -> int:
    """Check all jobs, then run them one after another; return the worst exit code."""
    from qvgen.config.build import check, group_sweep
    from qvgen.config.compose import compose_job, expand_sweep
    from qvgen.config.processes.device_choice import check_presence
    from qvgen.config.processes.visible_gpus import only_gpus
    from qvgen.config.run_exports import with_profile
    from qvgen.config.sweep import separate_folders
    from qvgen.verbs._other_ways import answer, launch

    about = flags.help or flags.hydra_help or flags.cfg or flags.info or flags.shell_completion
    jobs = [with_profile(verb, job) for job in expand_sweep(flags.overrides, multirun=bool(flags.multirun or about))]
    if about:
        answer(verb, arguments, flags, jobs, header=verbs()[verb])
        return DONE
    composed = [compose_job(verb, job) for job in jobs]
    plains, choices = separate_folders(verb, [plain for plain, _ in composed], jobs), [choice for _, choice in composed]
    if len(jobs) > 1:
        group_sweep(plains)
    if verb == "train":
        launched_world.check_world(plains)
    for plain, job in zip(plains, jobs, strict=True):
        if "typed" in plain and flags.config_dir:
            plain["typed"] = ["--config-dir", flags.config_dir, *plain["typed"]]
        check(verb, plain)
        _check_resume(plain, job)
    if (world := launched_world.current()) is not None and world.rank and verb == "train":
        from qvgen.verbs._launched import take_part

        return take_part(verb, plains[0])
    _log_to_stderr()
    if world is not None and not world.rank and not any(plain["dry_run"] for plain in plains):
        logging.getLogger(__name__).info(world.label)
    if flags.launcher and (found := launch(verb, flags, jobs, plains)):
        return _after_jobs(verb, plains, [code if code in _SEVERITY else BUG for code in found], show=show)
    from qvgen.training.distributed.ahead import started_ahead

    with started_ahead(verb, plains, choices), only_gpus(check_presence(plains, choices)):
        lines = [None if choice is None else choice.line for choice in choices]
        codes = _run_here(verb, flags, jobs, plains, lines=lines, show=show)
    return _after_jobs(verb, plains, codes, show=show)


def _run_here(
    verb: str,
    flags: Namespace,
    jobs: Sequence[Sequence[str]],
    plains: Sequence[dict[str, Any]],
    *,
    lines: Sequence[str | None],
    show: bool,
) -> list[int]:
    """Run jobs one after another in this process, until one is stopped; their exit codes.

    Each of ``lines`` is what a job chose by itself, said when it begins unless the one before said the same.
    """
    from qvgen.config.processes.device_choice import say_later
    from qvgen.config.sweep import folder_of_job

    run = import_verb(verb).run
    codes: list[int] = []
    folder = ["--config-dir", flags.config_dir] if flags.config_dir else []
    commands = [
        command_line(verb, [*folder, *job], changes=folder_of_job(verb, plain))
        for plain, job in zip(plains, jobs, strict=True)
    ]
    for index, (plain, job) in enumerate(zip(plains, jobs, strict=True)):
        begin_job(verb, [*folder, *job])
        stop_request.note()
        stop_request.continue_with(folder_of_job(verb, plain) if len(jobs) > 1 else None, how="start again")
        stop_request.not_begun(commands[index + 1 :])
        say_later(None if lines[index] in lines[max(0, index - 1) : index] else lines[index])
        codes.append(_run_job(run, verb, plain, show=show))
        if codes[-1] in (INTERRUPTED, TERMINATED):
            break
    return codes


def _after_jobs(verb: str, plains: Sequence[dict[str, Any]], codes: list[int], *, show: bool) -> int:
    """Compare the runs of a sweep that nobody stopped; the worst exit code."""
    if len(plains) > 1 and not {INTERRUPTED, TERMINATED} & set(codes):
        from qvgen.verbs.compare import after_sweep

        codes = [*codes, _guarded(lambda: after_sweep(verb, plains), name=verb, show_traceback=show)]
    return max(codes, key=_SEVERITY.index)


def _run_job(run: Callable[[Any], int | None], verb: str, plain: dict[str, Any], *, show: bool) -> int:
    from qvgen.config.build import build

    return _guarded(lambda: run(build(verb, plain)), name=verb, show_traceback=show)


def _check_resume(plain: dict[str, Any], overrides: list[str]) -> None:
    if plain.get("resume") and not any(override.startswith("run_dir=") for override in overrides):
        raise UserError(f"resume={str(plain['resume']).lower()} needs run_dir=...: which run shall be continued?")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a program that calls main() again may have changed it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, handlers=[_Stderr()], format="%(message)s")


def _own_the_environment(verb: str) -> None:
    """Forget ranks that another launcher left: Lightning would wait for processes that are not there; quieten torch."""
    from qvgen.training.distributed.foreign_launcher import find_world, forget_ranks, refuse_world

    world = None if verb in _READING_VERBS else find_world(os.environ, refuses=verb not in _SHARING_VERBS)
    launched_world.enter(world if verb in ("train", *_SHARING_VERBS) else None)
    if verb not in ("train", *_SHARING_VERBS):
        refuse_world(verb, world)
    forget_ranks(os.environ)
    work_item.forget()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ warnings would land in the progress bar


def _worker(arguments: list[str]) -> None:
    """One further process of a verb's run; started by qvgen.training.distributed.launcher, never by hand."""
    from qvgen.training.distributed.child import follow_parent, wait_for_settings

    parser = ArgumentParser(prog="qvgen worker")
    parser.add_argument("verb", choices=sorted(verb_files()))
    for name in ("config", "--config-dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--trust", action="append", default=[])
    for name in ("rank", "world-size", "port", "parent", "beats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(arguments)
    follow_parent(given.parent, beats=given.beats)
    from qvgen.config.build import build
    from qvgen.config.run_config import read_plain

    _log_to_stderr()
    run_worker = import_worker(given.verb).run_worker
    wait_for_settings()
    with using_directory(given.config_dir), suppress(stop_request.Stopped):  # stopped with all others; rank 0 says so
        config = build(given.verb, read_plain(given.config), trusted=given.trust)
        run_worker(config, rank=given.rank, world_size=given.world_size, port=given.port)


def _guarded(action: Callable[[], int | None], *, name: str, show_traceback: bool) -> int:
    """Run an action and turn what it raises into an exit code and what a user needs to read."""
    try:
        return action() or DONE
    except stop_request.Stopped:
        return stop_request.say_end()
    except KeyboardInterrupt:  # a program that calls main() in another thread
        print(f"qvgen {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_ours(error):
            return _show_bug(error, name=name)
        if show_traceback:
            traceback.print_exc()
        whose = launched_world.whose(work_item.present()) if name in _SHARING_VERBS else ""
        print(f"qvgen {name}: {whose}{one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if (remedy := missing_library(error)) is None:
            return _show_bug(error, name=name)
        if show_traceback:
            traceback.print_exc()
        print(f"qvgen {name}: {remedy}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:  # the border of the program: a bug is shown whole and told by the exit code
        return _show_bug(error, name=name)


def _show_bug(error: Exception, *, name: str) -> int:
    traceback.print_exc()
    if name == "worker":  # rank 0 repeats the last line; a message of torch's may have several
        print(f"qvgen worker: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
    return BUG


if __name__ == "__main__":
    sys.exit(main())
