"""The Python interface: quantize any transformer of diffusers, train it in a loop of one's own, fold it and save it.

    >>> import torch
    >>> from diffusers import LTXVideoTransformer3DModel
    >>> import qvgen
    >>> model = LTXVideoTransformer3DModel(
    ...     in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
    ...     num_layers=1, caption_channels=16,
    ... )
    >>> report = qvgen.prepare(model, bits="w4a8", init="rtn")
    >>> len(report.quantized), report.skipped[:2]
    (10, ('proj_in', 'time_embed.emb.timestep_embedder.linear_1'))

``model`` is trained like any other module now: its quantized layers round weights and inputs in the forward pass and let
gradients through. :func:`fold` and :func:`qvgen.deploy.checkpoint.save_packed` end it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qvgen.config.runtime_check import check_runtime
from qvgen.deploy.on_the_fly import OPEN_ATTENTION, find_initializer, find_profile
from qvgen.deploy.quantizer import say_packed_
from qvgen.deploy.transformer_class import check_can_save
from qvgen.initializers.base import Initializer, LayerStatistics, Need
from qvgen.initializers.calibration import Calibration
from qvgen.initializers.clip_search import needs_with_inputs
from qvgen.initializers.prepare import PrepareConfig
from qvgen.initializers.prepare import prepare as prepare_layers
from qvgen.layers.attention_form import AttentionForm
from qvgen.layers.attention_swap import use_attention_forms_
from qvgen.layers.attention_trial import AttentionSearch, attention_candidates, chosen_forms
from qvgen.layers.swap import SwapReport, block_patterns, packed_layers, quantized_layers, select_linears
from qvgen.layers.swap import fold as fold_layers
from qvgen.models.few_step import falling_timesteps
from qvgen.quant.grid import Profile


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What :func:`prepare` does besides choosing grids and their start.

    Attributes:
        include: Name patterns (fnmatch) of the Linears to quantize; None: those in the model's repeated blocks.
        exclude: Name patterns of those to leave alone.
        phi_rank: Rank of the low-rank helper Phi; 0 for none. It has to be gone before folding (see
            :class:`qvgen.methods.phi_decay.PhiDecay`), unless ``phi_keep``.
        phi_keep: True: Phi acts on inputs before they are quantized, and :func:`fold` makes the rank that it has then a
            branch of the packed layer.
        num_noise_bands: Equal bands of the timestep with clip factors of their own; without meaning beside ``timesteps``.
        timesteps: A few-step model's own, [1000, 757, 522], falling, in (0, 1000]: each has clip factors, and an entry of
            static tables, of its own. Train and calibrate at these alone. None: any timestep comes.
        seed: Of the sample of inputs, and of the decomposition that starts Phi.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    phi_rank: int = 0
    phi_keep: bool = False
    num_noise_bands: int = 50
    timesteps: Sequence[float] | None = None
    seed: int = 0


def prepare(
    model: nn.Module,
    config: PrepareConfig | None = None,
    *,
    bits: int | str | None = None,
    profile: str | Profile = "paper",
    init: str | Initializer = "mse",
    calibrate: Callable[[nn.Module], object] | None = None,
    options: PrepareOptions | None = None,
) -> SwapReport:
    """Quantize a model's Linears for training, in place.

    Args:
        model: A transformer of diffusers whose forward takes a ``timestep`` in [0, 1000]; its weights are the start.
        config: All of what follows in one object, for callers who have it; nothing else is given then.
        bits: 2..8, or "wXaY" for weights and activations apart. Not given with a :class:`~qvgen.quant.grid.Profile`.
        profile: A file of conf/profile, or grids of one's own.
        init: A file of conf/init, or a PTQ method of one's own.
        calibrate: Runs the full-precision model, which it gets, on inputs like those that it will meet. Methods that need
            statistics don't start without it; with any method, clips of inputs start where these inputs lose least, and
            attentions get the form that a profile leaves open (``auto``).
        options: Which Linears, Phi, noise bands, a few-step model's timesteps, seed; None: the class's defaults.

    Returns:
        Names of the Linears that are quantized and of those that are not.

    Raises:
        ValueError: What can't be quantized, or could not be saved once it is trained; the model is unchanged then.
    """
    check_can_save(model)
    if config is not None:
        if config.profile.attention is not None and config.profile.attention.is_searched:
            raise ValueError(f"{OPEN_ATTENTION}; pass profile= and calibrate=, or write true or false")
        return prepare_layers(model, config)
    if quantized_layers(model) or packed_layers(model):
        raise ValueError("the model is quantized already; prepare a full-precision one")
    options = options or PrepareOptions()
    initializer, grids = find_initializer(init), find_profile(profile, bits)
    check_runtime(grids, additions=sorted(getattr(initializer, "additions", ())), init=str(init))
    if options.phi_rank and options.phi_keep:
        check_runtime(grids, additions=["branch"], what="phi_keep=True")
    timesteps = None if options.timesteps is None else falling_timesteps(options.timesteps)
    patterns = block_patterns(model) if options.include is None else tuple(options.include)
    chosen = PrepareConfig(
        profile=grids, initializer=initializer, include=patterns, exclude=options.exclude, seed=options.seed,
        num_noise_bands=options.num_noise_bands, timesteps=timesteps, phi_rank=options.phi_rank, phi_keep=options.phi_keep,
    )  # fmt: skip
    needs = needs_with_inputs(initializer.needs, grids, is_searched=calibrate is not None)
    if not needs and not (grids.attention is not None and grids.attention.is_searched):
        return prepare_layers(model, chosen)
    statistics, forms = _collect(model, chosen, calibrate, needs=needs, init=init)
    chosen = replace(chosen, statistics=statistics if needs else None, search_clips="inputs" in needs)
    report = prepare_layers(model, chosen)
    use_attention_forms_(model, forms)
    return report


def _collect(
    model: nn.Module,
    config: PrepareConfig,
    calibrate: Callable[[nn.Module], object] | None,
    *,
    needs: frozenset[Need],
    init: str | Initializer,
) -> tuple[Callable[[str], LayerStatistics], dict[str, AttentionForm]]:
    """What a method needs to know of the inputs, and forms of attentions, from the caller's function."""
    if calibrate is None and not needs:
        raise ValueError(f"{OPEN_ATTENTION}; pass calibrate=FUNCTION, or write true or false")
    if calibrate is None:
        raise ValueError(
            f"init={init} needs calibration ({', '.join(sorted(needs))}); pass calibrate=FUNCTION, which runs the model "
            "that it gets on typical inputs, or use init='mse'"
        )
    names = select_linears(model, include=config.include, exclude=config.exclude).quantized
    candidates = attention_candidates(model, config.profile.attention, quantized=names)
    open_ones = {name: forms for name, forms in candidates.items() if len(forms) > 1}
    collected = Calibration(
        model, names=names if needs else (), needs=needs, num_bands=len(config.timesteps or ()) or config.num_noise_bands,
        seed=config.seed, timesteps=config.timesteps,
    )  # fmt: skip
    with collected, AttentionSearch(model, open_ones) as search, torch.no_grad():
        calibrate(model)
    return collected.statistics, chosen_forms(candidates, search.errors())


def fold(model: nn.Module, *, kernel: str = "auto") -> int:
    """Replace every fake-quantized layer by its packed one, in place; a model without any is left as it is.

    The folded model is one that diffusers calls quantized: its ``save_pretrained`` writes what ``from_pretrained`` loads.

    Args:
        model: What :func:`prepare` made, trained or not.
        kernel: Backend that runs the packed layers; a name never falls back to another one.

    Returns:
        The number of layers that were folded.

    Raises:
        ValueError: Names the first layer whose Phi still has rank, or the first tensor of the model, quantized or not, that
            is not finite; nothing is changed then.
    """
    folded = fold_layers(model, kernel=kernel)
    if folded:
        say_packed_(model)
    return folded
