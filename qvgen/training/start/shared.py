"""A PTQ start that all processes of a run make together: each sets up some of the layers, and rank 0 gathers them.

    rank 0    samples statistics, if the method needs any; asks the others; sets up its layers, then those of theirs that
              nobody has begun; reads the rest
    others    for each layer of theirs that is left: read its weight from the model's files, set it up, write it, forget it

A layer's bits depend on its weight, its statistics and its name alone, so that they are the same whoever sets it up. Another
process than rank 0 holds one layer at a time (one for each of its threads) and never a model. Layers are the work of rank 0
alone where one depends on another, or the model's weights can't be read one by one; it says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qvgen import work_item
from qvgen.config.leaves import load_leaf
from qvgen.initializers.base import Initializer, LayerStatistics
from qvgen.initializers.prepare import LayerShare, are_independent, initialize_, initialize_layer_, setup_threads
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_threads import in_threads
from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.layers.swap import quantized_layers
from qvgen.models.base import TensorReader, VideoDiT
from qvgen.models.tensor_reader import tensor_reader_of
from qvgen.training.calibration.statistics import CalibratedModel, read_statistics
from qvgen.training.design.layer_setup import choose_gradient_path_, set_up_phi_
from qvgen.training.design.meta_model import build_student
from qvgen.training.design.student import StudentDesign
from qvgen.training.distributed.layer_shares import (
    SHARES_DIRECTORY,
    balanced_shares,
    claim_layer,
    layer_file,
    read_layer_,
    read_share,
    remove_shares,
    setup_costs,
    tensors_of_the_model,
    write_layer,
    write_shares,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
COPIES_PER_WEIGHT = 8
"""Bytes for each weight of a layer that a process without a model sets up: the layer's, and what it had from the model."""


@dataclass(frozen=True, kw_only=True)
class StartHelpers:
    """The other processes of a run, as rank 0 asks them to take part in its start.

    Attributes:
        world_size: All processes, rank 0 included.
        neighbours: Processes of a host, the same everywhere.
        run_dir: The run's folder, which all of them see.
        ask: Lets them begin: what they read is in that folder.
        check: Raises UnfitEnvironmentError where one of them is gone.
        ask_calibration: Lets them sample too (:func:`qvgen.training.start.run_calibration.sample_share`); None: rank 0
            samples by itself.
    """

    world_size: int
    neighbours: int
    run_dir: Path
    ask: Callable[[], object]
    check: Callable[[], object]
    ask_calibration: Callable[[], object] | None = None


def initialize_together_(
    student: nn.Module,
    init: Initializer,
    *,
    family: VideoDiT,
    seed: int,
    statistics: CalibratedModel | None,
    helpers: StartHelpers | None,
    done: Callable[[], object],
) -> Callable[[str], LayerStatistics] | None:
    """As rank 0, do what :func:`qvgen.initializers.prepare.initialize_` does, with the other processes' help.

    Args:
        student: Prepared, its Phis suspended; its weights are the full-precision ones.
        init: The PTQ method.
        family: The model family.
        seed: The run's.
        statistics: What the method has to know.
        helpers: The other processes; None: there are none.
        done: Called after each layer.

    Returns:
        See :func:`qvgen.initializers.prepare.initialize_`.

    Raises:
        UnfitEnvironmentError: Another process failed or is gone.
    """
    folds = family.smoothing_folds(student)
    alone = partial(initialize_, student, init, seed=seed, statistics=statistics, folds=folds)
    if helpers is None:
        return alone(done=done)
    if (why := _why_alone(init, family=family, folds=folds, helpers=helpers)) is not None:
        log.info("rank 0 makes the start by itself: %s", why)
        return alone(done=done)
    if init.needs and statistics is not None:
        statistics.sample_missing()
    layers, folder = quantized_layers(student), helpers.run_dir / SHARES_DIRECTORY
    shares = balanced_shares(setup_costs(layers, needs=init.needs), helpers.world_size)
    remove_shares(folder)
    folder.mkdir()
    kept = statistics.folder if init.needs and statistics is not None else None
    write_shares(folder, shares, neighbours=helpers.neighbours, statistics=kept)
    helpers.ask()
    log.info("the start: %d layers, set up by %d processes", len(layers), helpers.world_size)

    def own_done() -> None:
        helpers.check()
        done()

    def set_up(names: Sequence[str]) -> Callable[[str], LayerStatistics] | None:
        return alone(done=own_done, share=LayerShare(names=names, neighbours=helpers.neighbours))

    seen = set_up(shares[0])
    for name in _left_to_others(folder, shares[1:], set_up=lambda name: set_up([name])):
        _await_layer_(layers[name], layer_file(folder, name), helpers=helpers)
        done()
    remove_shares(folder)
    return seen


def _left_to_others(folder: Path, shares: Sequence[Sequence[str]], *, set_up: Callable[[str], object]) -> Sequence[str]:
    """Set up what nobody has begun of the others' layers; the names of those that somebody has, in the shares' order."""
    left = []
    for name in reversed([name for share in shares for name in share]):  # they begin with the first
        if claim_layer(folder, name):
            set_up(name)
        else:
            left.append(name)
    return left[::-1]


def _await_layer_(layer: FakeQuantLinear, file: Path, *, helpers: StartHelpers) -> None:
    """Bring a layer to what another process makes of it, when it has."""
    while not file.exists():
        helpers.check()
        time.sleep(POLL_SECONDS)
    read_layer_(layer, file)
    file.unlink()


def _why_alone(
    init: Initializer, *, family: VideoDiT, folds: Sequence[SmoothingFold], helpers: StartHelpers
) -> str | None:
    """Why rank 0 sets up all layers, in words; None where they are shared out."""
    if not are_independent(init, folds=folds):
        return "its layers depend on one another"
    if init.needs and helpers.neighbours != helpers.world_size:
        return "its statistics lie on one node"
    if tensor_reader_of(family) is None:
        return "the model's weights, or those of a finetune, can't be read layer by layer"
    return None


def set_up_share(
    run_dir: Path,
    *,
    rank: int,
    family: VideoDiT,
    design: StudentDesign,
    init: Initializer,
    seed: int,
    one_by_one: bool = False,
) -> None:
    """As another process than rank 0, set up the layers that it asked for and has not done itself since.

    Args:
        run_dir: The run's folder.
        rank: This process.
        family: The model family.
        design: The student's layers.
        init: The PTQ method.
        seed: The run's.
        one_by_one: Whether it holds one layer at a time; else as many as its host allows.

    Raises:
        ValueError: A weight, or its statistics, can't be read.
    """
    folder = run_dir / SHARES_DIRECTORY
    try:
        names, neighbours, statistics = read_share(folder, rank=rank)
    except FileNotFoundError:
        return  # rank 0 has done without
    read = tensor_reader_of(family)
    assert read is not None, "rank 0 would not have asked"
    planned = quantized_layers(build_student(family, design)[0])

    def set_up(name: str) -> None:
        if not claim_layer(folder, name):
            return
        work_item.begin(f"layer {name}")
        layer = _prepared_layer(name, planned[name], design=design, read=read)
        before = tensors_of_the_model(layer)
        seen = None if statistics is None else read_statistics(statistics, name)
        initialize_layer_(layer, init, name=name, seed=seed, statistics=seen)
        write_layer(folder, name, layer, before=before)

    def jobs() -> Iterator[Callable[[], None]]:
        yield from (partial(set_up, name) for name in names)

    weights = [torch.empty(()).expand(planned[name].weight.shape) for name in names]  # sizes, without memory
    threads = 1 if one_by_one else setup_threads(weights, init, neighbours=neighbours)
    for _ in in_threads(jobs(), threads=threads):
        pass


def _prepared_layer(
    name: str, planned: FakeQuantLinear, *, design: StudentDesign, read: TensorReader
) -> FakeQuantLinear:
    """One layer as it stands in rank 0's student when its PTQ method begins."""
    has_bias = planned.bias is not None
    linear = nn.Linear(planned.in_features, planned.out_features, bias=has_bias, device="meta")
    given = {part: nn.Parameter(read(f"{name}.{part}")) for part, _ in linear.named_parameters()}
    linear.load_state_dict(given, strict=True, assign=True)
    layer = FakeQuantLinear(
        linear,
        profile=planned.profile,
        noise_band=planned.noise_band,
        phi_rank=design.phi_rank,
        phi_keep=design.phi_keep,
        input_kind=planned.input_kind,
    )
    student = _alone(name, layer)
    initialize_layer_(layer, load_leaf("init", "rtn"), name=name, seed=None, statistics=None)
    set_up_phi_(student, design.phi)
    choose_gradient_path_(student, design.zero_point_gradient)
    design.method.prepare_(student)
    if layer.phi is not None:
        layer.phi.suspended = True
    return layer


def _alone(name: str, layer: FakeQuantLinear) -> nn.Module:
    """A module in which a layer has its name of the whole model."""
    root = nn.Module()
    parent = root
    *path, last = name.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(last, layer)
    return root
