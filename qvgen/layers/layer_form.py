"""The form of a quantized layer, all but the values of its tensors: plain data for checkpoints, resumed runs and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from qvgen.config.plain_json import flag, whole
from qvgen.layers.branch import kept_rank
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.grid import Profile
from qvgen.quant.width_table import Widths, WidthTable


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """The form of one layer.

    Attributes:
        profile: The two grids and the rotation.
        width_table: Widths that change over sampling, or None.
        input_scale: Whether the input is smoothed.
        branch_rank: Rank of the low-rank branch; 0 for none.

    Example:
        >>> from qvgen.quant.grid import Grid
        >>> grids = {"weight": Grid(bits=4, granularity="per_channel"), "activation": Grid(bits=4, granularity="per_token")}
        >>> form = LayerForm(profile=Profile(name="paper", **grids), width_table=WidthTable(switch=(4, 8)))
        >>> form.label, form.activation_widths, form.table_names(8)
        ('w4a4|8', (4, 8), ('clip_low_8', 'clip_high_8'))
        >>> LayerForm.from_dict(form.to_dict()) == form
        True
    """

    profile: Profile
    width_table: WidthTable | None = None
    input_scale: bool = False
    branch_rank: int = 0

    @classmethod
    def of(cls, layer: FakeQuantLinear) -> Self:
        """The form of a layer in training, a Phi left out."""
        return cls(
            profile=layer.profile,
            width_table=layer.width_table,
            input_scale=layer.input_scale is not None,
            branch_rank=0 if layer.branch_down is None else layer.branch_down.shape[0],
        )

    @classmethod
    def folded(cls, layer: FakeQuantLinear, *, phi_rank: int | None = None) -> Self:
        """The form of the packed layer that a layer is folded to, a kept Phi in its branch.

        ``phi_rank`` is the rank that such a Phi will have then, for a plan; None: the one that it has.
        """
        form, kept = cls.of(layer), kept_rank(layer)
        return replace(form, branch_rank=form.branch_rank + (kept if phi_rank is None else min(kept, phi_rank)))

    @property
    def widths(self) -> Widths:
        """The profile's weight and activation bits."""
        return self.profile.weight.bits, self.profile.activation.bits

    @property
    def weight_widths(self) -> tuple[int, ...]:
        """Widths of the sets of weight codes, rising."""
        return (self.widths[0],) if self.width_table is None else self.width_table.weight_widths(self.widths[0])

    @property
    def activation_widths(self) -> tuple[int, ...]:
        """Widths of the tables of the activations, rising."""
        return (self.widths[1],) if self.width_table is None else self.width_table.activation_widths(self.widths[1])

    @property
    def static(self) -> bool:
        """Whether ranges come from tables by sampling step."""
        return self.profile.activation.granularity == "per_tensor"

    @property
    def label(self) -> str:
        """Short name: the widths (w4a4, w4|8a4|8 with a table of widths), static ranges, the branch's rank."""
        widths = "".join(
            side + "|".join(map(str, found))
            for side, found in (("w", self.weight_widths), ("a", self.activation_widths))
        )
        branch = f" +r{self.branch_rank}" if self.branch_rank else ""
        return widths + (" static" if self.static else "") + branch

    def table_names(self, bits: int) -> tuple[str | None, str | None]:
        """Names of the two tables [num_bands] of an activation width; None: symmetric or unclipped, it has no such table."""
        symmetric = self.profile.activation.symmetric
        if self.static:
            return "static_scale", None if symmetric else "static_zero_point"
        if not self.profile.activation.clip:
            return None, None
        suffix = "" if bits == self.widths[1] else f"_{bits}"
        return None if symmetric else f"clip_low{suffix}", f"clip_high{suffix}"

    def declare_(self, layer: FakeQuantLinear) -> None:
        """Bring a layer in training to this form, its tensors are loaded afterwards; raises ValueError if it does not fit."""
        device, columns, rows = layer.weight.device, layer.in_features, layer.out_features
        whole(self.branch_rank, "branch_rank", high=min(columns, rows))
        self.profile.check_fits(columns)
        smoothed = torch.ones(columns, device=device) if self.input_scale else None
        layer.declare_(profile=self.profile, input_scale=smoothed)
        layer.set_width_table_(self.width_table)
        rank = self.branch_rank
        layer.set_branch_(*((torch.zeros(rank, columns), torch.zeros(rows, rank)) if rank else (None, None)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "profile": self.profile.to_dict(),
            "plan": None if self.width_table is None else self.width_table.to_dict(),
            "input_scale": self.input_scale,
            "branch_rank": self.branch_rank,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything malformed."""
        return cls(
            profile=Profile.from_dict(data["profile"]),
            width_table=None if data["plan"] is None else WidthTable.from_dict(data["plan"]),
            input_scale=flag(data["input_scale"], "input_scale"),
            branch_rank=whole(data["branch_rank"], "branch_rank"),
        )
