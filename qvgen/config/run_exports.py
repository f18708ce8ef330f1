"""`export=NAME` of a run: the targets that its packed model is written for, and the profile that they execute.

    qvgen ptq ... export=comfy                  profile=convrot is chosen, unless the command names one
    qvgen ptq ... export=[comfy,int8]           one that all of them execute; refused where there is none
    qvgen ptq ... export=cache_dit export.rank=32

Of several targets each takes the keys that its file has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from qvgen.config.leaf_file import leaf_names, read_leaf, users_targets
from qvgen.config.leaves import build_leaf
from qvgen.config.override import parse_override
from qvgen.config.schema.train import TrainConfig
from qvgen.errors import UserError, did_you_mean

GROUP = "export"
_VERBS = ("train", "ptq")


def chosen_targets(words: Sequence[str]) -> tuple[str, ...]:
    """The targets that overrides choose; none for a sweep over them, whose jobs choose one each."""
    chosen: tuple[str, ...] = ()
    for override in _overrides(words):
        if override.key_or_group == GROUP:
            value = override.value()
            names = value if isinstance(value, list) else [value]
            chosen = () if override.is_sweep_override() or value is None else tuple(dict.fromkeys(map(str, names)))
    return chosen


def with_profile(verb: str, words: Sequence[str]) -> list[str]:
    """The overrides of one job, and with them the profile that its targets execute where they name none.

    Raises:
        UserError: No such target, or no profile that all of them execute.
    """
    kept = list(words)
    targets = chosen_targets(kept) if verb in _VERBS else ()
    named = {override.key_or_group for override in _overrides(kept)}
    if not targets or named & {"profile", "experiment"}:
        return kept
    keys = {
        override.key_or_group: override.value() for override in _overrides(kept) if not override.is_sweep_override()
    }
    profiles = {name: found for name in targets if (found := _profiles(name, keys))}
    if not profiles:
        return kept
    common = [name for name in next(iter(profiles.values())) if all(name in found for found in profiles.values())]
    if not common:
        wanted = ", ".join(f"{target} needs {' or '.join(found)}" for target, found in profiles.items())
        raise UserError(
            f"export=[{','.join(targets)}] has no common profile: {wanted}; write one of them, and make another run for "
            "another profile"
        )
    return [*kept, f"profile={common[0]}"]


def build_exports(config: TrainConfig, *, trusted: Collection[str]) -> dict[str, Any]:
    """The targets' objects, by name.

    Args:
        config: A run's; its section ``export`` is plain.
        trusted: See :func:`qvgen.config.leaves.build_leaf`.

    Raises:
        ValueError: See :func:`qvgen.config.leaves.build_leaf`.
    """
    names, section = config.names.export or (), config.export
    if not names or not isinstance(section, Mapping):
        return {}
    if len(names) == 1:
        return {names[0]: build_leaf(section, key=GROUP, trusted=trusted)}
    typed = [override.key_or_group for override in _overrides(config.typed)]
    values = {f"{GROUP}.{key}": value for key, value in section.items() if f"{GROUP}.{key}" in typed}
    return {name: _with_keys(name, values) for name in names}


def _with_keys(name: str, values: Mapping[str, Any]) -> Any:
    """A target's object with those of some values (by ``export.KEY``) that its file has keys for."""
    spec = read_leaf(GROUP, name)
    own = {key: values[f"{GROUP}.{key}"] for key in spec if f"{GROUP}.{key}" in values and key != "_target_"}
    return build_leaf({**spec, **own}, key=GROUP, trusted=users_targets(GROUP, name))


def _overrides(words: Sequence[str]) -> list[Override]:
    return [parse_override(word) for word in words if not word.startswith("-") and "=" in word]


def _profiles(name: str, keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Profiles that are trained for a target with its keys; none for one that takes them all."""
    if name not in (names := leaf_names(GROUP)):
        raise UserError(f"unknown export={name}{did_you_mean(name, names)} (there are: {', '.join(names)})")
    return tuple(getattr(_with_keys(name, keys), "profiles", ()))
