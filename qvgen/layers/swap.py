"""Swapping a model's Linears for quantized ones by name patterns, and those for packed ones.

A Linear is quantized if its name matches an ``include`` pattern and no ``exclude`` pattern (fnmatch: ``*`` matches dots
too). A pattern that matches nothing is an error: a renamed layer would otherwise stay in full precision in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from qvgen.config.plain_json import flag, items, mapping, number, text
from qvgen.layers.attention_swap import (
    attention_forms,
    attention_records,
    follow_bands_,
    pack_attentions,
    restore_attentions_,
    swap_attentions_,
)
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.input_kind import input_kinds
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_threads import in_threads, num_threads
from qvgen.layers.noise_band import NoiseBand, step_bands, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.shared_input import activation_sharing, tie_activations_, unshare_activations_
from qvgen.layers.weight_rows import PACKING_SCRATCH, WeightRows
from qvgen.quant.finite import check_finite
from qvgen.quant.grid import Profile
from qvgen.quant.width_table import WidthTable

FOLD_REMEDY = "take an earlier checkpoint of the run, or train again with a lower learning rate"


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """Names of the Linears that were quantized and of those that were not, in the model's order."""

    quantized: tuple[str, ...]
    skipped: tuple[str, ...]


def select_linears(model: nn.Module, *, include: Sequence[str], exclude: Sequence[str]) -> SwapReport:
    """Which Linears of a model the patterns choose; changes nothing.

    Raises:
        ValueError: A pattern matches no Linear, nothing is left to quantize, or two names share one Linear.
    """
    _refuse_tied(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for kind, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{kind} pattern {pattern!r} matches none of the {len(names)} Linears of {type(model).__name__} "
                    f"(the first is {names[0] if names else 'none'!r}); correct or remove it"
                )

    def chosen(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)

    report = SwapReport(
        quantized=tuple(name for name in names if chosen(name)),
        skipped=tuple(name for name in names if not chosen(name)),
    )
    if not report.quantized:
        raise ValueError(f"include={list(include)} and exclude={list(exclude)} leave no Linear to quantize")
    return report


def block_patterns(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the Linears in a model's repeated blocks; of all Linears where it has none.

    Embeddings of timesteps and captions and the projections at both ends are few, small and sensitive: they stay as they are.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    held = [name for name in outermost if any(linear.startswith(f"{name}.") for linear in linears)]
    return tuple(f"{name}.*" for name in held) or ("*",)


def _refuse_tied(model: nn.Module) -> None:
    """A Linear with two names would be swapped under one of them and stay in full precision under the other."""
    first: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and (other := first.setdefault(id(module), name)) != name:
            raise ValueError(f"{other} and {name} are one Linear; untie them (copy the layer) before quantizing")


def quantized_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """All fake-quantized layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """All packed layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def swap_fake_quant_(
    model: nn.Module,
    *,
    names: Sequence[str],
    profile: Profile,
    num_noise_bands: int,
    phi_rank: int = 0,
    phi_keep: bool = False,
    timesteps: Sequence[float] | None = None,
) -> NoiseBand:
    """Replace the named Linears by FakeQuantLinears and make the model read its timesteps; attentions as the profile says.

    A few-step model has a noise band for each of its ``timesteps``, and others have ``num_noise_bands`` equal ones.
    Nothing is changed when a layer is refused.

    Returns:
        The noise bands that the layers share.

    Raises:
        ValueError: Names the layer or the attention that the profile or the rank does not fit.
    """
    band = step_bands(num_noise_bands, timesteps)
    attentions = attention_forms(model, profile.attention, quantized=names)
    linears, fitting = {}, set()
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linears[name] = linear
    profile = replace(profile.fitted(linear.in_features for linear in linears.values()), attention=None)
    for name, linear in linears.items():
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        if sizes in fitting:
            continue
        fitting.add(sizes)
        alike = nn.Linear(sizes[0], sizes[1], bias=sizes[2], device="meta")
        try:
            FakeQuantLinear(alike, profile=profile, noise_band=band, phi_rank=phi_rank, phi_keep=phi_keep)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or exclude the layer") from error
    watch_timestep(model, band)
    kinds = input_kinds(model, names)
    for name in names:  # one by one, each Linear freed at once: two copies of a large model may not fit
        layer = FakeQuantLinear(
            linears.pop(name), profile=profile, noise_band=band, phi_rank=phi_rank, phi_keep=phi_keep,
            input_kind=kinds[name],
        )  # fmt: skip
        model.set_submodule(name, layer)
    swap_attentions_(model, attentions, noise_band=band)
    return band


def forms(model: nn.Module) -> dict[str, Any]:
    """Describe a model's fake-quantized layers, but for their tensors, in plain values that a checkpoint can hold.

    ``timesteps`` are those of tables by sampling step, or None; ``shared_activations`` are sets of layers with one activation
    quantizer (:mod:`qvgen.layers.shared_input`). A model without fake-quantized layers has no noise bands and an empty dict
    of layers.
    """
    layers = quantized_layers(model)
    bands = [layer.noise_band for layer in layers.values()][:1]
    return {
        "timesteps": list(bands[0].timesteps) if bands and bands[0].timesteps is not None else None,
        "strict_timesteps": bool(bands) and bands[0].strict,
        "shared_activations": [list(names) for names in activation_sharing(layers)],
        "layers": {name: LayerForm.of(layer).to_dict() for name, layer in layers.items()},
        **({"attentions": records} if (records := attention_records(model)) else {}),
    }


def restore_forms_(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Bring a prepared model's layers to stored :func:`forms`; their tensors are loaded afterwards.

    Raises:
        ValueError: They are of other layers, or malformed; KeyError where something is missing.
    """
    layers, forms_by_name = quantized_layers(model), mapping(stored["layers"], "layers")
    if set(layers) != set(forms_by_name):
        raise ValueError(f"{len(forms_by_name)} stored layers are not the {len(layers)} of the model")
    restore_attentions_(model, items(stored.get("attentions", []), "attentions"))
    for band in [layer.noise_band for layer in layers.values()][:1]:
        if stored["timesteps"] is not None:
            band.use_timesteps_([number(t, "timesteps") for t in items(stored["timesteps"], "timesteps")])
        band.strict = flag(stored["strict_timesteps"], "strict_timesteps")
    follow_bands_(model)
    unshare_activations_(layers)
    for name, layer in layers.items():
        LayerForm.from_dict(mapping(forms_by_name[name], name)).declare_(layer)
    for names in items(stored.get("shared_activations", []), "shared_activations"):  # runs from before do not say
        tie_activations_([layers[text(name, "shared_activations")] for name in items(names, "shared_activations")])


def add_switch_widths_(model: nn.Module, widths: Sequence[int]) -> None:
    """Let a sampling policy choose among these activation widths in all layers of a prepared model.

    Raises:
        ValueError: A layer's own width is not among them, or its activations are static.
    """
    for name, layer in quantized_layers(model).items():
        if layer.profile.activation.bits not in widths:
            raise ValueError(
                f"activation_switch.widths={list(widths)} lack the {layer.profile.activation.bits} activation bits of {name}"
            )
        bands = () if layer.width_table is None else layer.width_table.bands
        layer.set_width_table_(WidthTable(bands=bands, switch=tuple(widths)))


@contextmanager
def phi_suspended(model: nn.Module) -> Iterator[None]:
    """Run a model without its Phis, for example to measure the PTQ start or what fold would give now."""
    helpers = [layer.phi for layer in quantized_layers(model).values() if layer.phi is not None]
    for phi in helpers:
        phi.suspended = True
    try:
        yield
    finally:
        for phi in helpers:
            phi.suspended = False


@contextmanager
def not_sampling(model: nn.Module) -> Iterator[None]:
    """Call a model with timesteps of no sampler: static tables interpolate, no policy chooses widths."""
    layers: list[FakeQuantLinear | PackedLinear] = [*quantized_layers(model).values(), *packed_layers(model).values()]
    bands = {id(layer.noise_band): layer.noise_band for layer in layers}.values()
    policies = [band.policy_bits for band in bands]
    for band in bands:
        band.sampling, band.policy_bits = False, None
    try:
        yield
    finally:
        for band, bits in zip(bands, policies, strict=True):
            band.sampling, band.policy_bits = True, bits


def fold(model: nn.Module, *, kernel: str = "auto") -> int:
    """Replace every FakeQuantLinear by its PackedLinear, and attentions' products, in place; a model without any stays.

    Returns:
        The number of layers that were folded.

    Raises:
        ValueError: Names the first layer whose Phi still has rank, or the first tensor of the model, quantized or not, that
            is not finite; nothing is changed then.
    """
    packed = _pack(model, kernel=kernel)
    for name, module in {**packed, **pack_attentions(model, kernel=kernel)}.items():
        model.set_submodule(name, module)
    return len(packed)


def folded_copy(model: nn.Module, *, kernel: str = "auto") -> nn.Module:
    """A folded model, the given one left as it is; no master weight is copied, only what was not quantized.

    Raises:
        ValueError: See :func:`fold`.
    """
    packed = _pack(model, kernel=kernel)
    products = pack_attentions(model, kernel=kernel)
    memo: dict[int, object] = {id(model.get_submodule(name)): made for name, made in {**packed, **products}.items()}
    for module in packed.values():
        memo[id(module.noise_band)] = module.noise_band  # the copy's hook sets the bands that its layers read
    return copy.deepcopy(model, memo)


def _pack(model: nn.Module, *, kernel: str) -> dict[str, PackedLinear]:
    check_finite(chain(model.named_parameters(), model.named_buffers()), source="cannot fold", remedy=FOLD_REMEDY)
    layers = quantized_layers(model)
    threads = num_threads((layer.weight for layer in layers.values()), scratch_per_weight=PACKING_SCRATCH)
    jobs = (partial(pack_layer, name, layer, kernel=kernel) for name, layer in layers.items())
    return dict(zip(layers, in_threads(jobs, threads=threads), strict=True))


def pack_layer(
    name: str, layer: FakeQuantLinear, *, kernel: str, weight: WeightRows | None = None, device: str | None = None
) -> PackedLinear:
    """The packed layer of a trained one, see :meth:`PackedLinear.from_fake_quant`; the trained one is left as it is.

    Raises:
        ValueError: Its Phi still has rank, or it is not finite; the name is in the message.
    """
    if layer.adapter is not None:
        raise ValueError(f"cannot fold {name}: its adapter is not merged; call the training method's finish_ first")
    try:
        packed = PackedLinear.from_fake_quant(layer, kernel=kernel, weight=weight, device=device)
    except ValueError as error:
        raise ValueError(f"cannot fold {name}: {error}") from error
    check_finite(packed.state_dict().items(), source=f"cannot fold {name}", remedy=FOLD_REMEDY)
    return packed
