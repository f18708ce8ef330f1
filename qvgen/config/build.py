"""From a plain dict to the configuration of a verb: first checked (cheap, imports no torch), then built."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from qvgen.config.bits import Bits
from qvgen.config.leaf_file import foreign_targets, targets_below, targets_of_folder
from qvgen.config.leaves import build_leaf, build_leaves, load_leaf
from qvgen.config.named_leaves import build_named, split_logger
from qvgen.config.quoting import command_word
from qvgen.config.run_config import read_config
from qvgen.config.run_exports import build_exports
from qvgen.config.runtime_check import check_runtime
from qvgen.config.schema.by_verb import SCHEMAS, VerbConfig
from qvgen.config.schema.evaluate import EvaluateConfig
from qvgen.config.schema.export import ExportConfig
from qvgen.config.schema.imports import ImportConfig
from qvgen.config.schema.recipe import check_recipe
from qvgen.config.schema.strategy import SHARDED_DEFAULTS
from qvgen.config.schema.train import FoldConfig, TrainConfig
from qvgen.config.schema.trainer import check_options
from qvgen.config.schema.verbs import BenchmarkConfig, PrecomputeConfig
from qvgen.config.typed import from_plain
from qvgen.errors import UserError

_BENCHMARK_KEYS = tuple(field.name for field in fields(BenchmarkConfig) if field.name != "run")
"""Keys of conf/benchmark.yaml that are no keys of a training run."""


def check(verb: str, plain: Mapping[str, Any]) -> VerbConfig:
    """The typed configuration with its leaves still plain: every key, type and range is checked.

    Raises:
        UserError: See :func:`qvgen.config.typed.from_plain`, or a run_dir that holds no run.
    """
    values: dict[str, Any] = dict(plain)
    if verb in ("train", "ptq", "precompute", "import", "evaluate", "generate"):
        values["plain"] = dict(plain)
        if verb in ("train", "ptq"):  # a run of an earlier version may have none of these keys
            values = {"export": None, "num_nodes": 1, **values, "names": {"export": None, **values["names"]}}
            if isinstance(values.get("evaluation"), dict):
                values["evaluation"] = {"suite": None, **values["evaluation"]}
            if isinstance(values.get("strategy"), dict):
                values["strategy"] = {
                    "shard_size": None,
                    "context_parallel": 1,
                    **SHARDED_DEFAULTS,
                    **values["strategy"],
                }
    elif verb == "fold":
        values["run"] = check("train", read_config(Path(str(values.get("run_dir")))))
    elif verb == "benchmark":
        own = {key: values.pop(key) for key in _BENCHMARK_KEYS}
        values = {**own, "run": check("train", values)}
    check_options(values.get("trainer"))
    if "logger" in values:
        values["logger"] = split_logger(values["logger"])
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("recipe"), dict):
        check_recipe(model["recipe"])
    return from_plain(SCHEMAS[verb], values)


def group_sweep(plains: Sequence[dict[str, Any]]) -> None:
    """Give the jobs of a sweep a common group of wandb runs, where they log there and have none; in place."""
    group = f"sweep {datetime.now():%Y-%m-%d %H:%M:%S}"
    for plain in plains:
        if "logger" in plain and plain["logger"].get("group", "") is None:
            plain["logger"]["group"] = group


_WITH_LEAVES = (EvaluateConfig, PrecomputeConfig, ExportConfig, ImportConfig, TrainConfig, BenchmarkConfig, FoldConfig)
"""Configurations with sections that are built; the other verbs may do without torch."""


def build(verb: str, plain: Mapping[str, Any], *, trusted: Collection[str] | None = None) -> Any:
    """The typed configuration with its leaves built: what a verb's ``run`` receives.

    Args:
        verb: A verb.
        plain: Its configuration.
        trusted: Classes outside of qvgen that its sections may name; None: all that it does name, because this command has
            composed it. What fold reads from a run's folder was composed by another one: there the classes count that the
            command names by ``trust`` or in its ``--config-dir``.

    Raises:
        ValueError: Any bad value, also one that only the leaf knows to be bad.
    """
    config = check(verb, plain)
    trusted = targets_below(plain) if trusted is None else trusted
    _check_kernel(plain, trusted=trusted)
    if isinstance(config, _WITH_LEAVES) or "torch" in sys.modules:
        from qvgen.cpu_threads import one_thread

        with one_thread():  # also makes torch's mathematics ready for what the verb computes
            return _built(config, trusted=trusted)
    return config


def _built(config: Any, *, trusted: Collection[str]) -> Any:
    if isinstance(config, PrecomputeConfig | ExportConfig | ImportConfig):
        return build_leaves(config, trusted=trusted)
    if isinstance(config, EvaluateConfig):
        return replace(config, suite=build_leaf(config.suite, key="suite", trusted=trusted))
    if isinstance(config, TrainConfig):
        exports = build_exports(config, trusted=trusted)
        if config.evaluation.suite is not None:
            load_leaf("suite", config.evaluation.suite)  # a name that is wrong is said before anything is computed
        built = replace(_with_named(build_leaves(config, trusted=trusted), trusted=trusted), export=exports)
        return _with_one_bits(built)
    if isinstance(config, BenchmarkConfig):
        return replace(config, run=_with_one_bits(build_leaves(config.run, trusted=trusted)))
    if isinstance(config, FoldConfig):
        return replace(config, run=_with_one_bits(_build_run(config)))
    return config


def _with_named(config: TrainConfig, *, trusted: Collection[str]) -> TrainConfig:
    """The configuration with callbacks and further loggers built; nothing of Lightning is imported where there are none."""
    further = build_named("logger", config.logger.further, trusted=trusted)
    callbacks = build_named("callbacks", config.callbacks, trusted=trusted)
    return replace(config, callbacks=callbacks, logger=replace(config.logger, further=further))


def _with_one_bits(config: TrainConfig) -> TrainConfig:
    """The configuration; raises UserError where the grids have other widths than ``bits``, which every label is made from."""
    grids = Bits(weight=config.profile.weight.bits, activation=config.profile.activation.bits)
    if grids != config.bits:
        raise UserError(
            f"the grids of profile={config.names.profile} have {grids.weight} bits for weights and {grids.activation} for "
            f"activations, and bits={config.bits.label}; widths are chosen by bits alone: write bits={grids.label}"
        )
    if config.method.quantizes:
        switched = () if config.activation_switch.widths is None else ("widths",)
        additions = sorted({*getattr(config.init, "additions", ()), *switched})
        check_runtime(config.profile, additions=additions, init=config.names.init)
        if config.phi.keep and config.method.phi_ranks(config.phi):
            check_runtime(config.profile, additions=["branch"], what="phi.keep=true")
    return config


def _check_kernel(plain: Mapping[str, Any], *, trusted: Collection[str]) -> None:
    """Raise UserError for a kernel that is a class which the command did not name."""
    kernel = str(plain.get("kernel", ""))
    if "." in kernel and kernel not in trusted:
        raise UserError(f"kernel={kernel} is a class of your own, and followed only where this command names it itself")


def _build_run(config: FoldConfig) -> TrainConfig:
    """The run that is folded; names the classes that nobody has vouched for, and how to."""
    trusted = {*config.trust, *targets_of_folder()}
    try:
        _check_kernel(config.run.plain, trusted=trusted)
        return build_leaves(config.run, trusted=trusted)
    except UserError as error:
        foreign = sorted(foreign_targets(config.run.plain) - trusted)
        if not foreign:
            raise
        raise UserError(
            f"{config.run_dir}/config.yaml: {error}; if it is yours write {command_word('trust', foreign)}"
        ) from error


def load_run(run_dir: Path) -> TrainConfig:
    """The configuration of a run that was started before, with its leaves built.

    Raises:
        UserError: ``run_dir`` holds no run, or one with keys that this version does not know.
    """
    try:
        config = build("train", read_config(run_dir), trusted=())
    except UserError as error:
        raise UserError(f"{run_dir}: {error}") from error
    assert isinstance(config, TrainConfig)
    return config
