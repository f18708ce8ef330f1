"""Float64 oracles of the grid, its gradients, and the QVGen layer with its optimizer. Imports nothing of qvgen.

Written from the papers (LSQ 1902.08153, LSQ+ 2004.09576, QVGen 2505.11497) and from the definition of the grid, one row
at a time. Forward values come from explicit loops in numpy; gradients from float64 autograd in which only the rounding
has a straight-through derivative of its own, so clamps, minima and maxima are differentiated by torch and not by
formulas. ``surrogate_*`` check that in turn by finite differences: with the rounding errors and the clamped elements
frozen, fake quantization is a smooth function whose true derivative is the straight-through gradient.

Kinds of zero point: "integer", "real", "none" (symmetric).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.hadamard_oracle import rotation_matrix

FLOOR = 1e-8
OFFSET_SHARE, LARGEST_ZERO = 2.0**-16, 2.0**17  # of real zero points
SMALLEST = {"float32": FLOOR, "bfloat16": FLOOR, "float16": 2.0**-14}
LARGEST = {"float32": np.inf, "bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0}
SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11}


# --------------------------------------------------------------------------- the grid, one row at a time


def limits(bits, kind):
    """Smallest and largest code."""
    top = 2 ** (bits - 1) - 1
    return (-top, top) if kind == "none" else (0, 2**bits - 1)


def round_scale(scale, dtype):
    """A scale, 1e-8 at least, in the precision of ``dtype`` (round half to even), inside of its normal numbers."""
    scale = np.maximum(np.asarray(scale, np.float64), FLOOR)
    if dtype != "float32":
        mantissa, exponent = np.frexp(scale)
        bits = SIGNIFICANT_BITS[dtype]
        scale = np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
    return np.clip(scale, SMALLEST[dtype], LARGEST[dtype])


def choose_qparams(row, *, bits, kind, clip_low=1.0, clip_high=1.0, scale_dtype="float32", arithmetic="reciprocal"):
    """Scale and zero point of one row [k] from its clipped minimum and maximum, 0 included but for real zero points.

    Of the arithmetic "unrounded", whose codes are made before the scale is rounded, the scale of the codes.
    """
    _, top = limits(bits, kind)
    if arithmetic == "division":
        return max(max(abs(v) for v in row) * clip_high, 1e-10) / top, 0.0
    scale_dtype = "float32" if arithmetic == "unrounded" else scale_dtype
    if kind == "none":
        return float(round_scale(max(abs(v) for v in row) * clip_high / top, scale_dtype)), 0.0
    if kind == "real":
        low, high = min(row) * clip_low, max(row) * clip_high
        scale = float(round_scale(max((high - low) / top, abs(low) * OFFSET_SHARE), scale_dtype))
        ends = (0, top) if low <= 0 <= high else (-LARGEST_ZERO, LARGEST_ZERO)
        return scale, float(np.clip(-low / scale, *ends))
    low, high = min(0.0, *row) * clip_low, max(0.0, *row) * clip_high
    scale = float(round_scale((high - low) / top, scale_dtype))
    return scale, float(np.clip(np.rint(-low / scale), 0, top))


def quantize(row, scale, zero, *, bits, kind):
    """Codes of one row [k], int64."""
    low, high = limits(bits, kind)
    real = row / scale + zero if kind == "real" else np.rint(row / scale) + zero
    return np.clip(np.rint(real), low, high).astype(np.int64)


def fake_quantize(row, scale, zero, *, bits, kind):
    """Grid values of one row [k]."""
    return scale * (quantize(row, scale, zero, bits=bits, kind=kind) - zero)


def tie_distance(row, scale, zero, *, kind):
    """How far, in codes, the nearest element of a row is from a tie of its rounding (0 .. 0.5)."""
    position = row / scale + (zero if kind == "real" else 0.0)
    return float(np.abs(position - np.floor(position) - 0.5).min())


def scale_tie_distance(scale, dtype):
    """The same for the rounding of a scale to 16 bits, in units of its last place; 0.5 for float32."""
    if dtype == "float32":
        return 0.5
    mantissa = np.ldexp(np.frexp(np.asarray(scale, np.float64))[0], SIGNIFICANT_BITS[dtype])
    return float(np.abs(mantissa - np.floor(mantissa) - 0.5).min())


def search_error(row, scale, zero, *, bits, kind, exponent=2.4):
    """Sum of |x^ - x|^2.4 over one row."""
    return float((np.abs(fake_quantize(row, scale, zero, bits=bits, kind=kind) - row) ** exponent).sum())


# --------------------------------------------------------------------------- straight-through gradients by autograd


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _pass_through(x, value):
    """``value`` in the forward pass, the derivative of ``x`` in the backward pass."""
    return x + (value - x).detach()


def ste_fake_quantize(x, scale, zero, *, bits, kind):
    """Fake quantization of float64 tensors with an STE for the rounding and autograd for all else."""
    low, high = limits(bits, kind)
    real = _Round.apply(x / scale + zero) if kind == "real" else _Round.apply(x / scale) + zero
    return scale * (real.clamp(low, high) - zero)


def ste_dynamic_fake_quantize(
    row, clip_low, clip_high, *, bits, kind, scale_dtype="float32", arithmetic="reciprocal", through_zero_point=True
):
    """Fake quantization of one row [k] on its own clipped range; the path through the range is differentiated.

    Its part through the zero point may be left out.
    """
    if arithmetic == "unrounded":
        smooth = ste_dynamic_fake_quantize(row, clip_low, clip_high, bits=bits, kind=kind)
        scale, _ = choose_qparams(row.detach().numpy(), bits=bits, kind=kind, clip_high=float(clip_high.detach()))
        codes = quantize(row.detach().numpy(), scale, 0.0, bits=bits, kind=kind)
        return _pass_through(smooth, torch.as_tensor(codes * round_scale(scale, scale_dtype)))
    _, top = limits(bits, kind)
    nothing = torch.zeros((), dtype=torch.float64)
    if kind == "none":
        span = row.abs().amax() * clip_high
    else:
        low, high = row.amin(), row.amax()
        low = (low if low < 0 or kind == "real" else nothing) * clip_low
        high = (high if high > 0 or kind == "real" else nothing) * clip_high
        span = high - low
    scale = (span / top).clamp(min=SMALLEST[scale_dtype], max=LARGEST[scale_dtype])
    scale = _pass_through(scale, torch.as_tensor(round_scale(scale.detach().numpy(), scale_dtype)))
    if kind == "none":
        return ste_fake_quantize(row, scale, nothing, bits=bits, kind=kind)
    zero = -low / scale
    zero = _Round.apply(zero) if kind == "integer" else zero
    zero = _pass_through(zero, zero.clamp(0, top)) if kind == "integer" else zero
    zero = zero if through_zero_point else zero.detach()
    return ste_fake_quantize(row, scale, zero, bits=bits, kind=kind)


def surrogate_fake_quantize(x, scale, zero, *, at, bits, kind):
    """Smooth stand-in for fake quantization near ``at`` = (x0, scale0, zero0), numpy, one row.

    Its rounding error and the set of clamped elements are those of ``at``; its derivative is the STE.
    """
    x0, scale0, zero0 = at
    low, high = limits(bits, kind)
    position = np.rint(x0 / scale0 + zero0) if kind == "real" else np.rint(x0 / scale0) + zero0
    error = position - (x0 / scale0 + zero0)
    moving = x / scale + zero + error
    code = np.where(position < low, low, np.where(position > high, high, moving))
    return scale * (code - zero)


def finite_difference(function, point, *, step=1e-6):
    """Gradient of a scalar function of a float64 vector by central differences; error about step^2."""
    gradient = np.zeros_like(point)
    for i in range(len(point)):
        shift = np.zeros_like(point)
        shift[i] = step
        gradient[i] = (function(point + shift) - function(point - shift)) / (2 * step)
    return gradient


# --------------------------------------------------------------------------- singular values


def best_rank_error(matrix, rank):
    """Least possible |matrix - rank-r matrix|^2 (Eckart-Young), from the dense spectrum."""
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


# --------------------------------------------------------------------------- the QVGen layer and AdamW


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """What a QVGen layer computes with: both grids and the rotation."""

    weight_bits: int
    weight_kind: str
    activation_bits: int
    activation_kind: str
    group: int = 0
    scale_dtype: str = "float32"
    weight_scale_dtype: str = "float32"
    rotation: int = 0
    rotation_kind: str = "sylvester"
    arithmetic: str = "reciprocal"


def weight_qparams(form, params):
    """Scale and zero point [N, G] as the grid uses them; clamps and roundings pass gradients through.

    The LSQ factor 1 / sqrt(K qmax), K the weights that share a scale, multiplies their gradients alone.
    """
    size = form.group or params["weight"].shape[1]
    _, top = limits(form.weight_bits, form.weight_kind)
    factor = (size * top) ** -0.5
    used = torch.as_tensor(round_scale(params["scale"].detach().numpy(), form.weight_scale_dtype))
    scale = _pass_through(params["scale"] * factor, used)
    if form.weight_kind == "none":
        return scale, torch.zeros_like(scale)
    zero = params["zero_point"].detach()
    used = zero.round().clamp(0, top) if form.weight_kind == "integer" else zero.clamp(-LARGEST_ZERO, LARGEST_ZERO)
    return scale, _pass_through(params["zero_point"] * factor, used)


def layer_forward(form, params, x, bands, gate):
    """Y = Q(X H) (Q(W) + (L gate) R)^T + bias, float64, differentiable in x and every entry of ``params``.

    Args:
        form: The grids.
        params: weight [N, K] (rotated already), scale and zero_point [N, G], left [N, r], right [r, K], bias [N],
            clip_low and clip_high [bands] (logits).
        x: [M, K].
        bands: Noise band of each row.
        gate: [r].
    """
    columns = x.shape[1]
    size = form.group or columns
    starts = range(0, columns, size)
    rotated = x @ torch.from_numpy(rotation_matrix(columns, form.rotation, form.rotation_kind))
    rows = []
    for row, band in zip(rotated, bands, strict=True):
        low = params["clip_low"][band].sigmoid() if form.activation_kind != "none" else torch.ones(())
        high = params["clip_high"][band].sigmoid()
        options = {"bits": form.activation_bits, "kind": form.activation_kind, "scale_dtype": form.scale_dtype}
        options |= {"arithmetic": form.arithmetic}
        rows.append(torch.cat([ste_dynamic_fake_quantize(row[s : s + size], low, high, **options) for s in starts]))
    scale, zero = weight_qparams(form, params)
    weights = []
    for n, row in enumerate(params["weight"]):
        options = {"bits": form.weight_bits, "kind": form.weight_kind}
        parts = [ste_fake_quantize(row[s : s + size], scale[n, g], zero[n, g], **options) for g, s in enumerate(starts)]
        weights.append(torch.cat(parts))
    effective = torch.stack(weights) + (params["left"] * gate) @ params["right"]
    return torch.stack(rows) @ effective.T + params["bias"]


def layer_tie_distance(form, params, x, bands):
    """Nearest distance to a tie of anything that the layer rounds: inputs, scales, zero points, weights."""
    columns = x.shape[1]
    size = form.group or columns
    rotated = x.detach().numpy() @ rotation_matrix(columns, form.rotation, form.rotation_kind)
    distances = []
    for row, band in zip(rotated, bands, strict=True):
        clips = [float(params[name][band].detach().sigmoid()) for name in ("clip_low", "clip_high")]
        for start in range(0, columns, size):
            part = row[start : start + size]
            options = {"bits": form.activation_bits, "kind": form.activation_kind}
            options |= {"clip_low": clips[0], "clip_high": clips[1]}
            distances.append(scale_tie_distance(choose_qparams(part, **options)[0], form.scale_dtype))
            scale, zero = choose_qparams(part, scale_dtype=form.scale_dtype, arithmetic=form.arithmetic, **options)
            distances.append(tie_distance(part, scale, zero, kind=form.activation_kind))
            if form.activation_kind == "integer":
                low = np.array([min(0.0, *part) * clips[0]])
                distances.append(tie_distance(low, scale, 0.0, kind="integer"))
    distances.append(scale_tie_distance(params["scale"].detach().numpy(), form.weight_scale_dtype))
    scale, zero = (value.detach().numpy() for value in weight_qparams(form, params))
    for n, row in enumerate(params["weight"].detach().numpy()):
        for g, start in enumerate(range(0, columns, size)):
            part = row[start : start + size]
            distances.append(tie_distance(part, scale[n, g], zero[n, g], kind=form.weight_kind))
    if form.weight_kind == "integer":
        distances.append(tie_distance(params["zero_point"].detach().numpy(), 1.0, 0.0, kind="integer"))
    return min(distances)


class AdamW:
    """Decoupled weight decay (1711.05101, Alg. 2) on float64 tensors by name, in place."""

    def __init__(self, *, betas, eps, learning_rates, weight_decays):
        self.betas, self.eps = betas, eps
        self.learning_rates, self.weight_decays = learning_rates, weight_decays
        self.first, self.second, self.count = {}, {}, 0

    @torch.no_grad()
    def step(self, params):
        self.count += 1
        for name, value in params.items():
            gradient, rate = value.grad, self.learning_rates[name]
            first = self.first.get(name, 0.0) * self.betas[0] + (1 - self.betas[0]) * gradient
            second = self.second.get(name, 0.0) * self.betas[1] + (1 - self.betas[1]) * gradient**2
            self.first[name], self.second[name] = first, second
            corrected = first / (1 - self.betas[0] ** self.count)
            size = (second / (1 - self.betas[1] ** self.count)).sqrt() + self.eps
            value.mul_(1 - rate * self.weight_decays[name]).sub_(rate * corrected / size)
            value.grad = None
