"""The kinds of layers that a machine is asked about: grids of the profiles, and shapes of the models' layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qvgen.config.bits import Bits
from qvgen.config.leaves import load_profile
from qvgen.errors import UserError
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_spec import layer_spec
from qvgen.models.folder.published import known_models
from qvgen_kernels import LinearSpec, available_kernels, refusals

GRIDS = (
    ("paper", "4"),
    ("paper", "3"),
    ("paper", "w4a8"),
    ("paper", "8"),
    ("convrot", "4"),
    ("int8", "8"),
    ("svdq_g64", "4"),
    ("w4a8_row", "w4a8"),
)
"""Profile and bits of each kind."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: Profile and bits.
        form: Its grids.
    """

    name: str
    form: LayerForm

    def spec(self, columns: int, outputs: int) -> LinearSpec | None:
        """The kernels' description at a shape; None where groups or rotation do not fit it."""
        try:
            return layer_spec(self.form, in_features=columns, out_features=outputs)
        except ValueError:
            return None

    def first_spec(self, shapes: Sequence[tuple[int, int]]) -> LinearSpec | None:
        """The spec at the first of some shapes that the kind fits."""
        return next((spec for shape in shapes if (spec := self.spec(*shape)) is not None), None)


def layer_kinds() -> list[LayerKind]:
    """All kinds."""
    return [
        LayerKind(name=f"{name} {bits}", form=LayerForm(profile=load_profile(name, Bits.parse(bits))))
        for name, bits in GRIDS
    ]


def layer_shapes(asked: Sequence[str] | None) -> list[tuple[int, int]]:
    """Inputs and outputs of the layers: those that were asked for, or those of all known models, small ones first.

    Raises:
        UserError: A text that is no shape.
    """
    if asked is not None:
        found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in asked]
        for text, match in zip(asked, found, strict=True):
            if match is None:
                raise UserError(f"shapes holds {text!r}; write KxN for K inputs and N outputs, as 1920x7680")
        return [(int(match[1]), int(match[2])) for match in found if match is not None]
    shapes = set()
    for model in known_models():
        sizes = model.sizes
        hidden = sizes.get("hidden_size") or sizes["num_attention_heads"] * sizes["attention_head_dim"]
        inner = sizes.get("ffn_dim", 4 * hidden)
        shapes |= {(hidden, hidden), (hidden, inner), (inner, hidden)}
    return sorted(shapes, key=lambda shape: shape[0] * shape[1])


def chosen_kernels(
    kinds: Sequence[LayerKind], shapes: Sequence[tuple[int, int]], device: torch.device
) -> dict[str, tuple[str, dict[str, str]]]:
    """Name of each kind -> the kernel that ``auto`` takes at the first shape that it fits, and why not the faster ones."""
    specs = {kind.name: spec for kind in kinds if (spec := kind.first_spec(shapes)) is not None}
    return {
        name: (available_kernels(spec, device=device)[0], refusals(spec, device=device)) for name, spec in specs.items()
    }


def with_outputs(spec: LinearSpec, count: int) -> LinearSpec:
    """The same layer with other outputs."""
    return replace(spec, out_features=count)
