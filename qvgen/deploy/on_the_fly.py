"""Quantizing a full-precision transformer while diffusers loads it, by a PTQ method that needs no data.

Layer by layer, so that only one master weight in float32 is there at a time: what :func:`qvgen.prepare` and
:func:`qvgen.fold` make of the same model, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import nn

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_leaf, load_profile
from qvgen.config.runtime_check import check_runtime
from qvgen.deploy.quantization_config import QvgenConfig
from qvgen.deploy.transformer_class import check_can_save
from qvgen.initializers.base import Initializer
from qvgen.initializers.bit_budget import BitBudget
from qvgen.layers.attention_swap import attention_forms, pack_attentions, swap_attentions_
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.input_kind import input_kinds
from qvgen.layers.noise_band import NoiseBand, watch_timestep
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import block_patterns, select_linears
from qvgen.quant.finite import check_finite
from qvgen.quant.grid import Profile

OPEN_ATTENTION = "profile.attention has smooth_key or rotation=auto, which calibration chooses"
"""Begins the message of whoever can't choose forms of attention."""


@dataclass(frozen=True, kw_only=True)
class OnTheFly:
    """The request of a :class:`QvgenConfig`, with its names looked up.

    Attributes:
        profile: Grids.
        initializer: The PTQ method.
        init_name: Its name.
        asked: The configuration, for patterns and noise bands.
    """

    profile: Profile
    initializer: Initializer
    init_name: str
    asked: QvgenConfig

    @classmethod
    def of(cls, asked: QvgenConfig) -> Self:
        """Look up the names.

        Raises:
            ValueError: An unknown name, a method that needs calibration, or bits that the profile's runtime does not have.
        """
        initializer, profile = find_initializer(asked.init), find_profile(asked.profile, asked.bits)
        name = asked.init if isinstance(asked.init, str) else type(asked.init).__name__
        if initializer.needs:
            raise ValueError(
                f"init={name} needs calibration ({', '.join(sorted(initializer.needs))}), for which loading has no inputs; "
                "use init='mse' or 'rtn', or calibrate it by qvgen ptq or qvgen.prepare(model, calibrate=...)"
            )
        if profile.attention is not None and profile.attention.is_searched:
            raise ValueError(f"{OPEN_ATTENTION}, for which loading has no inputs; write true or false")
        check_runtime(profile, additions=sorted(getattr(initializer, "additions", ())), init=name)
        return cls(profile=profile, initializer=initializer, init_name=name, asked=asked)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError for a model that can't be quantized, before its weights are read."""
        check_can_save(model)
        attention_forms(model, self.profile.attention, quantized=self.names(model))

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """The Linears to quantize."""
        patterns = block_patterns(model) if self.asked.include is None else self.asked.include
        return select_linears(model, include=patterns, exclude=self.asked.exclude).quantized


def quantize_(model: nn.Module, plan: OnTheFly) -> None:
    """Replace the Linears of a loaded model by packed layers, in place.

    Raises:
        ValueError: Names the layer that the profile does not fit, or the first tensor that is not finite.
    """
    check_finite(model.named_parameters(), source=type(model).__name__, remedy="download the weights again")
    names, band = plan.names(model), NoiseBand(plan.asked.num_noise_bands)
    attentions = attention_forms(model, plan.profile.attention, quantized=names)
    profile = replace(plan.profile.fitted(_linear(model, name).in_features for name in names), attention=None)
    watch_timestep(model, band)
    kinds = input_kinds(model, names)
    for name in names:
        try:
            layer = FakeQuantLinear(_linear(model, name), profile=profile, noise_band=band, input_kind=kinds[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or exclude the layer") from error
        plan.initializer.initialize_(layer, statistics=None)
        model.set_submodule(name, PackedLinear.from_fake_quant(layer))
    swap_attentions_(model, attentions, noise_band=band)
    for name, product in pack_attentions(model, kernel="auto").items():
        model.set_submodule(name, product)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def find_initializer(init: str | Initializer) -> Initializer:
    """The PTQ method of a name, or the object itself.

    Raises:
        ValueError: An unknown name, or a method that chooses widths in a whole run.
    """
    initializer: Initializer = load_leaf("init", init) if isinstance(init, str) else init
    if isinstance(initializer, BitBudget):
        raise ValueError(
            f"init={init} chooses the bits of each layer in a whole run; use qvgen ptq or qvgen train for it"
        )
    return initializer


def find_profile(profile: str | Profile, bits: int | str | None) -> Profile:
    """The grids of a name at some bits, or the object itself.

    Raises:
        ValueError: Bits beside a :class:`~qvgen.quant.grid.Profile`, or none beside a name; an unknown name.
    """
    if isinstance(profile, Profile):
        if bits is not None:
            raise ValueError(f"bits={bits} beside a Profile, which has its own; leave bits out")
        return profile
    if bits is None:
        raise ValueError(f"profile={profile!r} needs bits; write for example bits=4 or bits='w4a8'")
    grids: Profile = load_profile(profile, Bits.parse(bits))
    return grids
