"""The flags of a command line, with the names and meanings that Hydra's users know, and one line for what is wrong."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from qvgen.errors import UserError, did_you_mean

_REFUSED = {
    "config_name": "the verb names it",
    "config_path": "--config-dir adds a folder to it",
    "experimental_rerun": "it would load a pickle",
}

_ANSWERS = (("--help", "-h"), ("--hydra-help",), ("--resolve",), ("--run", "-r"), ("--multirun", "-m"))
_VALUES = (
    ("--package", "-p"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--config-dir", "-cd"),
    ("--experimental-rerun",),
)  # fmt: skip
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

LAUNCHER = "hydra/launcher"
"""The group of Hydra's launchers; its keys begin with ``hydra.launcher.``."""


class _Parser(ArgumentParser):
    """Raises UserError in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed."""
        raise UserError(f"{message}; see --help")


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Split the flags from the overrides.

    Args:
        arguments: The words behind the verb.

    Returns:
        ``help``, ``hydra_help``, ``cfg``, ``resolve``, ``package``, ``run``, ``multirun``, ``config_dir``, ``info``,
        ``shell_completion``, and ``overrides`` without those of the launcher, which are ``launcher``.

    Raises:
        UserError: An unknown flag, one that can't be used here, or an override of hydra's own keys.
    """
    parser = _Parser(prog="qvgen", add_help=False)
    parser.add_argument("overrides", nargs="*")
    for names in _ANSWERS:
        parser.add_argument(*names, action="store_true")
    for names in _VALUES:
        parser.add_argument(*names)
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown flag {unknown[0]}{did_you_mean(unknown[0], options)}")
    for name, reason in _REFUSED.items():
        if getattr(flags, name):
            raise UserError(f"--{name.replace('_', '-')} can't be used here: {reason}")
    keys = [override.lstrip("+~").partition("=")[0] for override in flags.overrides]
    is_launcher = [key == LAUNCHER or key.startswith("hydra.launcher.") for key in keys]
    for key, of_launcher in zip(keys, is_launcher, strict=True):
        if key.partition(".")[0].partition("/")[0] == "hydra" and not of_launcher:
            raise UserError(
                f"{key} has no effect here: jobs run in the present folder, and the sweep is what its words ask for; leave "
                f"it out (of Hydra's own keys {LAUNCHER}=... and hydra.launcher.* can be used with -m)"
            )
    pairs = list(zip(flags.overrides, is_launcher, strict=True))
    flags.launcher = [override for override, of_launcher in pairs if of_launcher]
    flags.overrides = [override for override, of_launcher in pairs if not of_launcher]
    if flags.launcher and not flags.multirun:
        raise UserError(f"{flags.launcher[0]} starts the jobs of a sweep; add -m")
    return flags
