"""An imported layer against the release's own forward pass, written down a second time in float32.

    f = sigmoid(logit)                lo = (min(x) f_lower) 0.95,  hi = (max(x) f_upper) 0.95      of each token
    s = (hi - lo) / P,  z = clamp(round(-lo / s), 0, P),  X = s (clamp(round(x / s + z), 0, P) - z)
    Y = X W' + bias                   W = s' (q - z')

Inputs are normal numbers. One that lies within 1e-3 of the middle between two codes is moved to its code: there two
exact ways of dividing may round to different sides, which says nothing of either. The product is summed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.deploy.importers.release_layer import CLIP, ReleaseLayer
from qvgen.deploy.importers.sampler_clips import ClipTable
from qvgen.layers.packed_linear import PackedLinear

TOLERANCE = 1e-6
"""Largest relative difference of a layer's output from the release's in float32."""

_ROWS = 8
_SEED = 20_250_515
_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """One layer on random inputs, largest over the entries of its tables that were tried.

    Attributes:
        error: |y - y_release| / |y_release|, the release in float32.
        own_rounding: The same between the release in the checkpoint's type and in float32: its rounding, which is not taken
            over.
    """

    error: float
    own_rounding: float


def check_layer(layer: ReleaseLayer, packed: PackedLinear, *, clips: ClipTable, name: str) -> LayerCheck:
    """Compare a packed layer with the release's arithmetic at the first, the middle and the last entry of its tables.

    Raises:
        ValueError: They differ by more than :data:`TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(_SEED)
    low, high = (torch.sigmoid(logits) for logits in (layer.lower, layer.upper))
    entries = sorted({0, len(clips.mix) // 2, len(clips.mix) - 1})
    errors, roundings = [], []
    for entry in entries:
        x = torch.randn(_ROWS, layer.weight.shape[1], generator=generator)
        factors = [(clips.mix[entry].double() @ side.double()).float() for side in (low, high)]
        x = away_from_ties(x, *factors, bits=layer.activation_bits)
        timestep, call = clips.place(entry)
        with packed.noise_band.calling(call):
            packed.noise_band.set_timestep(torch.tensor([500.0 if timestep is None else timestep]))
        wanted = release_output(layer, x, *factors, dtype=torch.float32)
        errors.append(_relative(packed(x.unsqueeze(0))[0].double(), wanted))
        roundings.append(_relative(release_output(layer, x, *factors, dtype=layer.weight.dtype), wanted))
    if not max(errors) <= TOLERANCE:  # also where one is no number
        raise ValueError(
            f"{name}: the packed layer differs by {max(errors):.2g} from the release's arithmetic, more than {TOLERANCE:g}; "
            "nothing was written"
        )
    return LayerCheck(error=max(errors), own_rounding=max(roundings))


def release_output(layer: ReleaseLayer, x: Tensor, low: Tensor, high: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The layer's output float64 [M, N] for x [M, K], every operation but the last product in ``dtype``.

    Args:
        layer: The layer, whose codes are always those of its own type.
        x: The input.
        low: Scalar, sigmoid of the logit of the minimum.
        high: That of the maximum.
        dtype: Type of the arithmetic.
    """
    scale, zero_point = _token_qparams(x.to(dtype), low.to(dtype), high.to(dtype), bits=layer.activation_bits)
    codes = torch.round(x.to(dtype) / scale + zero_point).clamp(0, 2**layer.activation_bits - 1)
    inputs = scale * (codes - zero_point)
    weight_scale, weight_zero = (value.to(dtype) for value in layer.qparams())
    weight = weight_scale * (layer.codes().to(dtype) - weight_zero)
    product = inputs.double() @ weight.double().T
    return product if layer.bias is None else product + layer.bias.double()


def _token_qparams(x: Tensor, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2**bits - 1
    bottom, top = x.amin(-1, keepdim=True) * low * CLIP, x.amax(-1, keepdim=True) * high * CLIP
    scale = (top - bottom) / qmax
    return scale, torch.round(-bottom / scale).clamp(0, qmax)


def away_from_ties(x: Tensor, low: Tensor, high: Tensor, *, bits: int) -> Tensor:
    """Move values of x that lie halfway between two codes to one of them; the rows' extremes, so their scales, stay."""
    scale = _token_qparams(x, low, high, bits=bits)[0]
    place = x / scale
    tied = ((place - place.floor()) - 0.5).abs() < _MARGIN
    extreme = (x == x.amin(-1, keepdim=True)) | (x == x.amax(-1, keepdim=True))
    return torch.where(tied & ~extreme, place.floor() * scale, x)


def _relative(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).norm() / wanted.norm().clamp(min=1e-30))
