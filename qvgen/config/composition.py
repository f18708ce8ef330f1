"""One composed configuration: from hydra, or from what hydra composed before for the same files.

    model=wan method=lsq     choose files: hydra reads about 25 and merges them, which takes most of a short command's time
    steps=12 phi.rank=4      are values, which are written over what was merged

So what was merged is kept for each choice, and a further job of a sweep with other values only copies it. A file that was
written since then, another folder or another plug-in is another choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

from hydra import compose
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from qvgen.config.conf_folder import FileState, conf_directory, user_directory
from qvgen.config.plugins import find_plugins


def choices_of(group: str) -> list[str]:
    """The files that ``GROUP=NAME`` can choose, as hydra lists them; none where a key is no group."""
    return sorted({path.stem for folder in _folders() for path in (folder / group).glob("*.yaml")})


def compose_known(verb: str, overrides: Sequence[Override], *, groups: Sequence[str]) -> DictConfig:
    """Compose a configuration from overrides that change keys and options which exist.

    Args:
        verb: Name of a file in conf/, without ``.yaml``.
        overrides: ``key=value``, none of which adds or takes away, has a package or is a sweep.
        groups: Keys of them that are groups.

    Returns:
        What ``hydra.compose`` returns for these overrides, its section ``hydra`` included; its own copy.

    Raises:
        HydraException: As ``hydra.compose``.
        OmegaConfBaseException: A key that does not exist, or a value that does not fit it.
    """
    written = [str(override.input_line) for override in overrides]
    if user_directory() is not None:  # it may be a large tree, and lasts for one command
        return compose(verb, written, return_hydra_config=True)
    chosen = tuple(str(override.input_line) for override in overrides if override.key_or_group in groups)
    config = deepcopy(_compose_chosen(verb, chosen, tuple(_file_states())))
    for override in overrides:
        if override.key_or_group not in groups:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    config.hydra.overrides.task = written
    config.hydra.runtime.cwd = os.getcwd()
    names = config.hydra.job.config.override_dirname
    kept = sorted(text for text in written if text.partition("=")[0] not in names.exclude_keys)
    config.hydra.job.override_dirname = names.item_sep.join(kept).replace("=", names.kv_sep)
    return config


@lru_cache(maxsize=64)
def _compose_chosen(verb: str, chosen: tuple[str, ...], files: tuple[FileState, ...]) -> DictConfig:  # noqa: ARG001
    """The result of hydra for a choice of files; ``files`` only tells one state of them all from another."""
    return compose(verb, list(chosen), return_hydra_config=True)


def _folders() -> Iterator[Path]:
    """The folders that hydra searches."""
    if (folder := user_directory()) is not None:
        yield folder
    yield conf_directory()
    yield from (plugin.directory for plugin in find_plugins().usable)


def _file_states() -> Iterator[FileState]:
    """The state of each file that can be chosen."""
    for folder in _folders():
        yield from map(FileState.of, sorted(folder.rglob("*.yaml")))
