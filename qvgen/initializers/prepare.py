"""prepare: a full-precision transformer becomes a quantized one that can be trained.

Swap the chosen Linears, let a PTQ method choose the first scales and zero points, start Phi from what is left over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qvgen.initializers.base import Initializer, LayerStatistics, Smoothing
from qvgen.initializers.clip_search import start_clips_
from qvgen.initializers.smoothing import fold_smoothing_
from qvgen.layers.attention_swap import follow_bands_
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.layer_threads import in_threads, num_threads
from qvgen.layers.smoothing_fold import SmoothingFold
from qvgen.layers.swap import SwapReport, packed_layers, quantized_layers, select_linears, swap_fake_quant_
from qvgen.quant.grid import Profile

SCRATCH_PER_WEIGHT = 32
"""Bytes for each weight of a layer that is set up: a decomposition in float64, and what it is compared with."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a model is quantized.

    Attributes:
        profile: Grids and rotation (methods: docs/method.md).
        initializer: An object of :mod:`qvgen.initializers`, which sets each layer's scales and zero points.
        include: Name patterns of the Linears to quantize (fnmatch).
        exclude: Name patterns of the Linears to leave alone.
        num_noise_bands: Equal bands of the timestep with clip factors of their own.
        timesteps: A few-step model's own, each of which has a band, in place of equal ones; None: equal ones.
        phi_rank: Rank of the low-rank helper; 0 for none.
        phi_keep: Whether it stays as a branch of the packed layers.
        seed: Seed of the randomized decomposition that starts Phi.
        starts_phi: Whether Phi starts here; False leaves it at 0, for a start or a state that follows.
        statistics: A layer's name -> what calibration saw of it; None is enough for a data-free method.
        folds: Where the model lets smoothing vectors disappear (a family's ``smoothing_folds``); none: each stays a
            multiplication.
        search_clips: Whether clips of inputs start where the sampled inputs lose least (``statistics`` has ``inputs`` then),
            and not where the table of widths and bits says.
    """

    profile: Profile
    initializer: Initializer
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    num_noise_bands: int = 50
    timesteps: Sequence[float] | None = None
    phi_rank: int = 0
    phi_keep: bool = False
    seed: int = 0
    starts_phi: bool = True
    statistics: Callable[[str], LayerStatistics] | None = None
    folds: Sequence[SmoothingFold] = ()
    search_clips: bool = False


def prepare(model: nn.Module, config: PrepareConfig) -> SwapReport:
    """Quantize a model's Linears for training, in place.

    Args:
        model: A transformer whose forward takes a ``timestep``; its weights are the starting point.
        config: What is quantized and how.

    Returns:
        The names of the layers that were quantized and of those that were skipped.

    Raises:
        ValueError: A pattern that matches nothing; a layer that the profile or the rank does not fit. The model
            is unchanged then.
    """
    if quantized_layers(model) or packed_layers(model):
        raise ValueError("the model is quantized already; prepare a full-precision one")
    report = select_linears(model, include=config.include, exclude=config.exclude)
    swap_fake_quant_(
        model,
        names=report.quantized,
        profile=config.profile,
        num_noise_bands=config.num_noise_bands,
        phi_rank=config.phi_rank,
        phi_keep=config.phi_keep,
        timesteps=config.timesteps,
    )
    seed = config.seed if config.starts_phi else None
    seen = initialize_(model, config.initializer, seed=seed, statistics=config.statistics, folds=config.folds)
    if seen is not None and config.search_clips:
        start_clips_(quantized_layers(model), (), statistics=seen)
    return report


@dataclass(frozen=True, kw_only=True)
class LayerShare:
    """The layers of a model that this process sets up, where several processes share them out.

    Attributes:
        names: Names of the layers.
        neighbours: Processes of this host that set up layers at the same time, this one included: they share its cores.
    """

    names: Collection[str]
    neighbours: int


def initialize_(
    model: nn.Module,
    initializer: Initializer,
    *,
    seed: int | None,
    statistics: Callable[[str], LayerStatistics] | None = None,
    folds: Sequence[SmoothingFold] = (),
    done: Callable[[], object] = lambda: None,
    share: LayerShare | None = None,
) -> Callable[[str], LayerStatistics] | None:
    """Let a PTQ method set up all layers of a prepared model, and start its Phis from what each of them loses.

    Several layers at a time, where the method says that it can (``concurrent``); the bits are the same.

    Args:
        model: Its master weights are those of the full-precision model.
        initializer: An object of :mod:`qvgen.initializers`.
        seed: Seed of the randomized decomposition that starts Phi; None: Phis stay as they are.
        statistics: A layer's name -> its statistics; not called for a data-free method.
        folds: Where smoothing vectors go into what stands before, if the method has any and is asked to.
        done: Called after each layer.
        share: The layers that are set up here, where :func:`are_independent` says that they may be shared out; None: all.

    Returns:
        A layer's name -> the statistics of its inputs as they are now, smoothing that was folded included; None where there
        are none.

    Raises:
        ValueError: The method needs statistics and there are none.
    """
    if initializer.needs and statistics is None:
        raise ValueError(
            f"{type(initializer).__name__} needs calibration ({', '.join(sorted(initializer.needs))}); give "
            "PrepareConfig(statistics=...) what qvgen.initializers.calibration.Calibration collected"
        )
    folded = {}
    if isinstance(initializer, Smoothing) and initializer.fold_smoothing and statistics is not None:
        folded = fold_smoothing_(model, initializer, folds=folds, statistics=statistics)

    def seen(name: str) -> LayerStatistics:
        assert statistics is not None
        of_layer = statistics(name)
        return of_layer.folded(folded[name]) if name in folded else of_layer

    layers = quantized_layers(model)
    if share is not None:
        layers = {name: layer for name, layer in layers.items() if name in share.names}

    def jobs() -> Iterator[Callable[[], None]]:
        for name, layer in layers.items():  # statistics are read, and sampled, in this thread
            statistics = seen(name) if initializer.needs else None
            yield partial(initialize_layer_, layer, initializer, name=name, seed=seed, statistics=statistics)

    weights = (layer.weight for layer in layers.values())
    threads = setup_threads(weights, initializer, neighbours=1 if share is None else share.neighbours)
    for _ in in_threads(jobs(), threads=threads):
        done()
    follow_bands_(model)
    return None if statistics is None else seen


def initialize_layer_(
    layer: FakeQuantLinear,
    initializer: Initializer,
    *,
    name: str,
    seed: int | None,
    statistics: LayerStatistics | None,
) -> None:
    """Let a PTQ method set up one layer, and start its Phi; the same bits whichever process does it.

    Args:
        layer: Its master weight is that of the full-precision model.
        initializer: An object of :mod:`qvgen.initializers`.
        name: Name of the layer in its model: it keys what is drawn.
        seed: Seed of the randomized decomposition that starts Phi; None: Phi stays as it is.
        statistics: Statistics of its inputs; None for a data-free method.
    """
    target = initializer.initialize_(layer, statistics=statistics)
    if seed is not None:
        layer.start_phi_(generator=_layer_generator(name, seed=seed), target=target)


def setup_threads(weights: Iterable[Tensor], initializer: Initializer, *, neighbours: int = 1) -> int:
    """How many layers of these weights a process sets up at a time, beside ``neighbours - 1`` others on its host."""
    if not getattr(initializer, "concurrent", False):
        return 1
    return num_threads(weights, scratch_per_weight=SCRATCH_PER_WEIGHT, neighbours=neighbours)


def are_independent(initializer: Initializer, *, folds: Sequence[SmoothingFold]) -> bool:
    """Whether a method sets up each layer by itself, so that processes may share the layers out.

    A smoothing vector that is folded changes the layer before, and a method that does not say ``concurrent`` may keep
    something from one layer to the next.
    """
    is_folded = isinstance(initializer, Smoothing) and initializer.fold_smoothing and bool(folds)
    return bool(getattr(initializer, "concurrent", False)) and not is_folded


def _layer_generator(name: str, *, seed: int) -> torch.Generator:
    """A generator keyed by the layer's name: excluding one layer does not change what others draw."""
    digest = hashlib.blake2b(f"phi/{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
