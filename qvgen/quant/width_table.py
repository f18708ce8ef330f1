"""WidthTable: widths of one layer that change while a video is sampled.

    bands    each noise band has its own pair (weight bits, activation bits): mixed precision over windows of timesteps
             (ViDiT-Q, arXiv 2406.02540, Sec. 4; its released map gives the first quarter 8-bit weights)
    switch   activation widths that a sampling policy may choose from at any step (delta-GBS of DVD-Quant, arXiv 2505.18663)

A layer has one set of weight codes per weight width and one clip table per activation width, whatever the table says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvgen.quant.grid import MAX_BITS, MIN_BITS, Profile

Widths = tuple[int, int]
"""Weight bits and activation bits."""


@dataclass(frozen=True, kw_only=True)
class WidthTable:
    """Which widths a layer uses when.

    Attributes:
        bands: (weight bits, activation bits) of each noise band; empty: the profile's in all of them.
        switch: Activation widths that a policy may ask for, rising; empty: it has no say in this layer.

    Raises:
        ValueError: Neither is given, or a width is outside 2..8.

    Example:
        >>> width_table = WidthTable(bands=((8, 8), (4, 6), (4, 4), (4, 4)))
        >>> width_table.mean_bits(), width_table.weight_widths(4), width_table.activation_widths(4)
        ((5.0, 5.5), (4, 8), (4, 6, 8))
    """

    bands: tuple[Widths, ...] = ()
    switch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.bands and not self.switch:
            raise ValueError("a table of widths without bands and without a switch says nothing; leave it out")
        for width in (*(width for pair in self.bands for width in pair), *self.switch):
            if not isinstance(width, int) or not MIN_BITS <= width <= MAX_BITS:
                raise ValueError(
                    f"a table of widths has a width of {width!r} bits; use whole numbers in {MIN_BITS}..{MAX_BITS}"
                )
        if any(len(pair) != 2 for pair in self.bands):
            raise ValueError("each band of a table of widths needs two widths: of the weight and of the activation")
        if len(self.switch) == 1 or list(self.switch) != sorted(set(self.switch)):
            raise ValueError(f"switch={list(self.switch)} must be two or more rising widths, for example [4, 8]")

    def check_fits(self, profile: Profile, *, num_bands: int) -> None:
        """Raise ValueError where the table can't be that of a layer with this profile and so many noise bands."""
        if self.bands and len(self.bands) != num_bands:
            raise ValueError(
                f"the table of widths has {len(self.bands)} bands and the model {num_bands}; make them equal"
            )
        if profile.activation.granularity == "per_tensor" and len(self.activation_widths(profile.activation.bits)) > 1:
            raise ValueError("static activations have one table of scales; a table of widths can't change their bits")

    def widths(self, band: int, *, profile: Profile, policy_bits: int | None) -> Widths:
        """The widths of a sample in ``band`` while a policy asks for ``policy_bits`` (None: there is no policy)."""
        weight, activation = self.bands[band] if self.bands else (profile.weight.bits, profile.activation.bits)
        return weight, policy_bits if policy_bits in self.switch and policy_bits is not None else activation

    def weight_widths(self, base: int) -> tuple[int, ...]:
        """Widths of the sets of weight codes that a layer of ``base`` bits needs, rising."""
        return tuple(sorted({base, *(weight for weight, _ in self.bands)}))

    def activation_widths(self, base: int) -> tuple[int, ...]:
        """Widths of the clip tables that a layer of ``base`` bits needs, rising."""
        return tuple(sorted({base, *(activation for _, activation in self.bands), *self.switch}))

    def mean_bits(self) -> tuple[float, float]:
        """Mean weight and activation bits over the noise bands (a policy's choices are not known here)."""
        assert self.bands, "a table without bands has the profile's bits"
        weights, activations = zip(*self.bands, strict=True)
        return sum(weights) / len(self.bands), sum(activations) / len(self.bands)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        return {"bands": [list(pair) for pair in self.bands], "switch": list(self.switch)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WidthTable:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        bands = tuple(tuple(pair) for pair in data["bands"])
        return cls(bands=bands, switch=tuple(data["switch"]))
