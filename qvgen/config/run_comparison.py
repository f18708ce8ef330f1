"""Whether a folder holds the very run that a command describes: what of two configurations may differ, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvgen.config.run_config import CONFIG_FILE, read_config
from qvgen.errors import UserError

FREE_KEYS = (
    "run_dir", "resume", "dry_run", "debug", "device_memory_gib", "checkpoint", "training", "logger",
    "trainer.profiler", "trainer.detect_anomaly", "trainer.log_every_n_steps",
    "names.experiment", "names.export", "export", "typed",
    "model.path", "model.transformer", "model.weights", "model.lora", "model.lora_high", "model.lora_low", "data.path",
    "data.videos", "data.cache", "data.readers", "calibration.cache",
    "strategy.reshard_after_forward", "strategy.prefetch", "strategy.gather",
)  # fmt: skip
"""Keys (with all below them) that may differ when a run is continued: they change no number that it computes, or they are
places of things whose content is compared (:mod:`qvgen.run_identity`)."""

WORLD_KEYS = (
    "devices",
    "num_nodes",
    "strategy.name",
    "strategy.shard_size",
    "strategy.cpu_offload",
    "strategy.context_parallel",
    "names.strategy",
)
"""Keys of the processes that share a run out, which may be others when it is continued, and which its record names then: the
state that it goes on from is the same bit for bit, later sums are added in another order."""

FOLLOWING_KEYS = ("accumulate",)
"""Keys that may be others together with a number of processes, from which their defaults follow."""


def check_content(
    path: Path, plain: dict[str, Any], *, resume: bool, force: bool
) -> tuple[bool, tuple[str, ...], dict[str, tuple[str, str]]]:
    """Whether the folder holds this very run, keys that only one configuration has, and another world; raises UserError."""
    if not (path / CONFIG_FILE).exists():
        others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if others:
            raise UserError(f"run_dir={path} is not empty ({others[0]}) and holds no run; choose another")
        return False, (), {}
    found = list(_differences(read_config(path), plain))
    world = {key: values for key, values, is_new in found if key in WORLD_KEYS and not is_new}
    if world.keys() & {"devices", "num_nodes", "strategy.context_parallel"}:
        world |= {key: values for key, values, is_new in found if key in FOLLOWING_KEYS and not is_new}
    further = [(key, values, is_new) for key, values, is_new in found if key not in world]
    refused = [(key, values) for key, values, is_new in further if not (force and is_new)]
    if refused:
        texts = [f"{key} is {there} there and {here} here" for key, (there, here) in refused]
        shown = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")
        remedy = "choose another run_dir"
        if all(is_new for _, _, is_new in further):
            remedy += "; if it began with another version of qvgen write resume=force"
        raise UserError(f"run_dir={path} holds another configuration's run: {shown}; {remedy}")
    if not resume:
        raise UserError(f"run_dir={path} holds this very run; continue it with resume=true or choose another run_dir")
    return True, tuple(key for key, _, _ in further), world


def _differences(
    there: Any, asked: Any, key: str = "", *, is_new: bool = False
) -> Iterator[tuple[str, tuple[str, str], bool]]:
    """Key, values there and here, and whether one side lacks it, of every value that differs; no free keys."""
    if key in FREE_KEYS or there == asked:
        return
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in sorted(there.keys() | asked.keys(), key=str):
            both = name in there and name in asked
            yield from _differences(
                there.get(name), asked.get(name), f"{key}.{name}" if key else str(name), is_new=not both
            )
    else:
        yield key, (_shown(there), _shown(asked)), is_new


def lasting(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that stays for as long as a run lasts: all but :data:`FREE_KEYS`."""

    def kept(value: Any, key: str) -> Any:
        if not isinstance(value, dict):
            return value
        names = {name: f"{key}.{name}" if key else name for name in value}
        return {name: kept(value[name], full) for name, full in names.items() if full not in FREE_KEYS}

    result: dict[str, Any] = kept(as_plain(plain), "")
    return result


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def as_plain(value: Any) -> Any:
    """Mappings as dicts, tuples as lists, paths as text, all the way down."""
    if isinstance(value, Mapping):
        return {str(name): as_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
