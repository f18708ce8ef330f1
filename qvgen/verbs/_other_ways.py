"""Commands that run no job in this process: questions about a verb, and jobs that a launcher of hydra runs elsewhere."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from qvgen.config.compose import compose_plain
from qvgen.config.run_exports import with_profile


def answer(
    verb: str, arguments: Sequence[str], flags: Namespace, jobs: Sequence[Sequence[str]], *, header: str
) -> None:
    """Print what is asked about a verb, its options or its configuration.

    Args:
        verb: The verb.
        arguments: All words of the command line behind it.
        flags: Those of them that are no overrides, and the overrides.
        jobs: Overrides of each job.
        header: The verb in one line.
    """
    if not flags.shell_completion:
        for job in jobs:
            if job or flags.config_dir:  # nothing can be wrong where nothing was written
                compose_plain(verb, job, resolve=False)
    if flags.help:
        from qvgen.config.help_page import help_page

        print(help_page(verb, jobs[0], header=header))
        return
    from qvgen.config.hydra_program import answer as answer_of_hydra

    own_flags = [argument for argument in arguments if argument not in flags.overrides]
    answer_of_hydra(verb, [*own_flags, *with_profile(verb, flags.overrides)])


def launch(
    verb: str, flags: Namespace, jobs: Sequence[Sequence[str]], plains: Sequence[Mapping[str, Any]]
) -> list[int | None]:
    """Run jobs through the launcher that was asked for.

    Returns:
        Their exit codes, None for one that it did not bring to its end; empty where it is the built-in one.
    """
    from qvgen.config.hydra_program import launch as launch_by_hydra
    from qvgen.config.hydra_program import launcher_name
    from qvgen.config.sweep import launch_folder, words_of_job

    if launcher_name(flags.launcher) is None:
        return []
    folder = ["--config-dir", flags.config_dir] if flags.config_dir else []
    commands = [[verb, *folder, *words_of_job(verb, job, plain)] for job, plain in zip(jobs, plains, strict=True)]
    found: list[int | None] = list(
        launch_by_hydra(verb, [*folder, *flags.overrides, *flags.launcher], commands, folder=launch_folder())
    )
    for number, code in enumerate(found):
        if code is None:
            print(f"qvgen {verb}: the launcher did not bring job {number} to its end", file=sys.stderr)
    return found
