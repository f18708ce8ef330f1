"""From conf/ and the command line's overrides to a plain dict: the only module that speaks to hydra's compose API.

Every way in which an override can be wrong is found here, before hydra prints its own account of it: text that is no
override, an unknown key or option, a sweep without --multirun, an interpolation that fails.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from qvgen.config.bits import Bits
from qvgen.config.composition import choices_of, compose_known
from qvgen.config.conf_folder import conf_directory, using_directory
from qvgen.config.leaf_file import check_choice
from qvgen.config.leaves import LEAF_GROUPS
from qvgen.config.named_leaves import NAMED_GROUPS
from qvgen.config.override import as_one_text, as_written, parse_override
from qvgen.config.processes.device_choice import DeviceChoice
from qvgen.config.prompts.prompt import without_files
from qvgen.config.quoting import command_word
from qvgen.config.resolvers import register_resolvers
from qvgen.config.schema.trainer import refuse_option
from qvgen.config.search_path import register_folders
from qvgen.config.settled import settle_
from qvgen.errors import UserError, did_you_mean, one_line, unknown_key

log = logging.getLogger(__name__)

_OPEN_SECTIONS = (*LEAF_GROUPS, *NAMED_GROUPS)
"""Sections whose keys are the arguments of a leaf: `+method.new_key=1` is checked when the leaf is built."""


def expand_sweep(overrides: Sequence[str], *, multirun: bool) -> list[list[str]]:
    """Split `bits=4,3 seed=1` into the overrides of each job; one job where nothing is swept.

    Raises:
        UserError: Text that is no override, or a sweep although ``multirun`` is False.
    """
    read = [
        parse_override(text, before=overrides[:index], after=overrides[index:]) for index, text in enumerate(overrides)
    ]
    written = [as_written(override) for override in read]  # a text that looks like a number, 1e3, in quotes
    parsed = [parse_override(text) for text in written]
    for override in parsed:
        if not override.is_sweep_override():
            continue
        line, key, one = str(override.input_line), override.key_or_group, as_one_text(override)
        if not multirun:
            several = f"{line} names several values; "
            raise UserError(f"{several}{one and f'for one text write {one}; '}add -m to run one job for each")
        if one and " " in line:  # without a space it is rather a list of paths
            log.warning("%s is a sweep, one job for each of its values; for one text write %s", key, one)
    try:
        jobs = _jobs(parsed)
    except HydraException as error:
        raise UserError(f"cannot read the sweep: {_cause(error)}") from error
    # A key that is not swept stays as it was typed: hydra's sweeper writes values in another way, and a repeated key once.
    last = {override.get_key_element(): (override, text) for override, text in zip(parsed, written, strict=True)}
    typed = {key: text for key, (override, text) in last.items() if not override.is_sweep_override()}
    return [[typed.get(entry.partition("=")[0], entry) for entry in job] for job in jobs]


def _jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """Every combination of the values of swept keys, the last key changing fastest; of a repeated key the last value."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise UserError(f"{override.input_line} names no values; write for example {override.key_or_group}=1,2")
    return [list(job) for job in itertools.product(*values.values())]


def compose_plain(
    verb: str, overrides: Sequence[str], *, extra_directory: Path | None = None, resolve: bool = True
) -> dict[str, Any]:
    """Compose the configuration of one job.

    Args:
        verb: Name of a file in conf/, without ``.yaml``.
        overrides: `key=value` texts without sweeps.
        extra_directory: A folder of the user's whose files count as if they lay in conf/; None: the command's, if any.
        resolve: False only checks the overrides, leaves interpolations alone and lets values be missing.

    Returns:
        The configuration: only dict, list, str, int, float, bool and None inside.

    Raises:
        UserError: Anything wrong with an override.
    """
    return compose_job(verb, overrides, extra_directory=extra_directory, resolve=resolve)[0]


def compose_job(
    verb: str, overrides: Sequence[str], *, extra_directory: Path | None = None, resolve: bool = True
) -> tuple[dict[str, Any], DeviceChoice | None]:
    """As :func:`compose_plain`, and how its number of processes was chosen, where the verb trains and it is resolved."""
    register_resolvers()
    register_folders()
    GlobalHydra.instance().clear()
    try:
        folder = str(conf_directory())
        with using_directory(extra_directory), initialize_config_dir(version_base="1.3", config_dir=folder):
            written = [as_written(parse_override(text)) for text in overrides]
            config = _compose_checked(verb, written)
            HydraConfig.instance().set_config(config)
            choice = settle_(config) if resolve else None
            plain = _to_plain(config, overrides, resolve=resolve)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot compose the configuration: {_cause(error)}") from error
    return (without_files(plain) if resolve else plain), choice


def group_options(verb: str) -> dict[str, list[str]]:
    """Group -> its options, for the groups of a verb; see :func:`compose_plain`."""
    register_folders()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_directory())):
        return _options(compose_known(verb, [], groups=[]))


def _to_plain(config: DictConfig, overrides: Sequence[str], *, resolve: bool) -> dict[str, Any]:
    with open_dict(config):
        del config["hydra"]
    if "bits" in config:
        Bits.parse(config["bits"])
    try:
        plain = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is missing; write {error.full_key}=...") from error
    except InterpolationResolutionError as error:
        hint = _interpolation_hint(str(error.full_key), overrides)
        raise UserError(f"cannot work out {error.full_key}: {_cause(error)}{hint}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _interpolation_hint(key: str, overrides: Sequence[str]) -> str:
    """How to write ${ itself, where a text of the command line has it."""
    for override in map(parse_override, overrides):
        value = None if override.is_delete() else override.value()
        if override.key_or_group == key and isinstance(value, str) and "${" in value:
            return f"; for ${{ itself write {command_word(key, value)}"
    return ""


def _compose_checked(verb: str, written: Sequence[str]) -> DictConfig:
    """Compose the configuration; an unknown key or option is named by us instead of by hydra.

    The check composes up to twice more. It is left out where hydra has found everything by itself.
    """
    overrides = [parse_override(text) for text in written]
    options = {key: choices_of(key) for key in {override.key_or_group for override in overrides} if key.isidentifier()}
    groups = [key for key, names in options.items() if names]
    if not all(_is_known_to_hydra(override, options.get(override.key_or_group, [])) for override in overrides):
        _check_overrides(verb, overrides)
        return compose(verb, list(written), return_hydra_config=True)
    for override in overrides:
        if override.key_or_group in groups:
            check_choice(override.key_or_group, str(override.value()))
    try:
        return compose_known(verb, overrides, groups=groups)
    except (HydraException, OmegaConfBaseException):
        _check_overrides(verb, overrides)
        raise


def _is_known_to_hydra(override: Override, options: Sequence[str]) -> bool:
    """Whether hydra composes an override only if its key or option exists; it lets more pass that is added or taken away.

    Args:
        override: One of the command's.
        options: The options of the group that its key is; none where it is no group.
    """
    key, value = override.key_or_group, override.value()
    if override.type is not OverrideType.CHANGE or override.package is not None or override.is_sweep_override():
        return False
    if key.partition(".")[0] == "hydra" or not all(part.isidentifier() for part in key.split(".")):
        return False
    return not options or (isinstance(value, str) and value in options)


def _check_overrides(verb: str, overrides: Sequence[Override]) -> None:
    """Find the first override whose key or option does not exist."""
    base = compose_known(verb, [], groups=[])
    options = _options(base)
    of_groups = [override for override in overrides if override.key_or_group in options]
    for override in of_groups:
        _check_option(override, options[override.key_or_group])
    if all(_is_known_to_hydra(override, options[override.key_or_group]) for override in of_groups):
        base = compose_known(verb, of_groups, groups=list(options))
    else:
        base = compose(verb, [str(override.input_line) for override in of_groups], return_hydra_config=True)
    keys = {key for key in _keys(base) if key.partition(".")[0] != "hydra"}
    for override in overrides:
        name = override.key_or_group
        if name in options or name in keys:
            continue
        if override.is_add() and name.partition(".")[0] in _OPEN_SECTIONS and name.partition(".")[0] in keys:
            continue
        if name.startswith("trainer.") and "trainer" in keys:
            refuse_option(name.removeprefix("trainer."))
        raise unknown_key(name, {key for key in keys | set(options) if not key.endswith("._target_")})


def _options(config: DictConfig) -> dict[str, list[str]]:
    """Group -> its options, for the groups that this configuration chooses from."""
    loader = GlobalHydra.instance().config_loader()
    return {
        group: sorted(loader.get_group_options(group))
        for group in config.hydra.runtime.choices
        if not group.startswith("hydra/")
    }


def _check_option(override: Override, options: list[str]) -> None:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        raise UserError(f"{override.input_line} takes {group} away; choose one of {', '.join(options)}")
    chosen = value if isinstance(value, list) else [value]
    for option in chosen:
        optional = option is None and group in ("experiment", "export")
        if not optional and str(option) not in options:
            raise UserError(
                f"unknown {group}={'null' if option is None else option}"
                f"{did_you_mean(str(option), options)} (there are: {', '.join(options)})"
            )
        check_choice(group, str(option))


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and values."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_missing() or node._is_none() or node._is_interpolation()):
            yield from _keys(node, f"{prefix}{name}.")


def _cause(error: BaseException) -> str:
    """The message of the innermost cause that hydra and omegaconf wrapped, on one line."""
    while isinstance(error, HydraException | OmegaConfBaseException) and error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)
