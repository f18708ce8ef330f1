"""A layer for SVDQuant's W4A4 kernels, in cache-dit and in diffusers' nunchaku_lite: tensors and arithmetic.

    qweight         int8 [N', K'/2]      codes -7..7 in groups of 64 columns, by tiles (``svdq_tiles``)
    wscales         [K'/64, N']          smooth_factor [K'], which inputs are DIVIDED by: 1 / our smoothing vector
    proj_down       [K', R]              proj_up [N', R], a branch on the inputs as they come
    bias            [N']                 everything but qweight in bfloat16 or float16

    r = max|x / smooth| (1/7) per token and group,   q_x = rne((x / smooth) / r),   s_x = r in half precision
    y = sum over groups of (q_x q_w) s_x s_w + (x down^T) up^T + bias

``svdq_output`` adds groups in float32. The kernels keep the sum in half precision h: for every group

    y = h(y + h(q_x q_w) h(s_x s_w))      one rounding for the multiplication and the addition

then h(y + branch) and h(y + bias). ``svdq_half_output`` does the same, in the order of the columns; what it differs by is
measured in docs/benchmarks/svdq-accumulation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qvgen.deploy.exporters.base import DTYPES, Fit, cast
from qvgen.deploy.exporters.svdq_tiles import (
    FRAGMENT,
    GROUP,
    pack_down,
    pack_scale,
    pack_up,
    pack_vector,
    pack_weight,
    pad_matrix,
    padded,
    unpack_down,
    unpack_scale,
    unpack_up,
    unpack_vector,
    unpack_weight,
)
from qvgen.errors import UserError
from qvgen.layers.fake_quant_product import rotated
from qvgen.layers.packed_linear import PackedLinear
from qvgen.quant.affine import quantize
from qvgen.quant.grid import MIN_SCALE, Grid
from qvgen.quant.ranges import search_qparams

BITS, QMAX = 4, 7
BOUND = (
    "The kernels add groups and the branch in half precision, which is measured here apart; they add within a group and in "
    "the branch in orders of their own, and round inputs to the model's precision first."
)


@dataclass(frozen=True, kw_only=True)
class SvdqForm:
    """How layers are stored.

    Attributes:
        dtype: bfloat16 or float16, of scales and all other floating-point tensors.
        rank: Rank of all branches of the file, a multiple of 16, or 0.
    """

    dtype: str
    rank: int

    @property
    def grid(self) -> Grid:
        """Grid of a weight that is quantized again."""
        scale: dict[str, object] = {"scale_dtype": self.dtype}
        return Grid(bits=BITS, granularity="per_group", group_size=GROUP, zero_point="none", **scale)  # type: ignore[arg-type]

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The layer's tensors, padded to multiples of 128, padding as cache-dit's packer makes it."""
        rows, columns, dtype = padded(layer.out_features), padded(layer.in_features), DTYPES[self.dtype]
        codes, scale = self._weight(layer)
        smooth = torch.ones(columns)
        if layer.input_scale is not None:
            smooth[: layer.in_features] = layer.input_scale.reciprocal()
        down, up = torch.zeros(self.rank, columns), torch.zeros(rows, self.rank)
        if layer.branch_down is not None and layer.branch_up is not None:
            down[: layer.form.branch_rank, : layer.in_features] = layer.branch_down.float()
            up[: layer.out_features, : layer.form.branch_rank] = layer.branch_up.float()
        tensors = {
            "qweight": pack_weight(pad_matrix(codes, rows, columns)),
            "wscales": pack_scale(pad_matrix(scale.to(dtype), rows, columns // GROUP, value=1)),
            "smooth_factor": pack_vector(smooth.to(dtype)),
            "proj_down": pack_down(down.to(dtype)),
            "proj_up": pack_up(up.to(dtype)),
        }
        if layer.bias is not None:
            bias = torch.ones(rows)
            bias[: layer.out_features] = layer.bias.detach()
            tensors["bias"] = pack_vector(cast(bias, self.dtype))
        return tensors

    def _weight(self, layer: PackedLinear) -> tuple[Tensor, Tensor]:
        """Codes int8 [N, K] and scales float32 [N, K / 64]: the layer's own, or those of its dequantized weight."""
        if not weight_reasons(layer, dtype=self.dtype):
            return layer.integer_codes(), layer.weight_scale
        weight = rotated(layer.dequantized_weight(), layer.profile)
        scale, zero_point = search_qparams(weight, grid=self.grid)
        return quantize(weight, scale=scale, zero_point=zero_point, grid=self.grid), scale


def check_half_dtype(dtype: str) -> None:
    """Raise UserError for a precision that the kernels do not have."""
    if dtype not in ("bfloat16", "float16"):
        raise UserError(f"export.dtype={dtype} is not among bfloat16, float16, which the kernels have")


def check_rank(rank: int, *, lowest: int) -> None:
    """Raise UserError for a rank that no file can have."""
    if rank < lowest or rank != padded(rank, FRAGMENT):
        raise UserError(
            f"export.rank={rank} is no multiple of {FRAGMENT} from {lowest} on; use {max(lowest, FRAGMENT)}"
        )


def check_branch(layer: PackedLinear, *, rank: int) -> None:
    """Raise UserError for a layer whose branch has more rank than the file is to have."""
    if layer.form.branch_rank > rank:
        wanted = padded(layer.form.branch_rank, FRAGMENT)
        raise UserError(f"its branch has rank {layer.form.branch_rank}, more than export.rank={rank}; write {wanted}")


def svdq_fit(layer: PackedLinear, *, dtype: str) -> Fit:
    """Whether the layer's codes and inputs are those of the kernels; smoothing and branch are, up to their rounding."""
    if layer.in_features % GROUP:
        raise UserError(f"in_features={layer.in_features} is no multiple of {GROUP}, a group of the kernels")
    weight, inputs = weight_reasons(layer, dtype=dtype), _input_reasons(layer, dtype=dtype)
    bits = layer.profile.weight.bits if not weight else BITS
    return Fit(weight=tuple(weight), inputs=tuple(inputs), runs_as=f"w{bits}a{BITS}")


def weight_reasons(layer: PackedLinear, *, dtype: str) -> list[str]:
    """Reasons why the weight's codes can't be taken as they are."""
    profile = layer.profile
    grid = profile.weight
    found = {
        f"weight of {grid.bits} bits": grid.bits > BITS,
        "weight with a zero point": not grid.symmetric,
        f"weight without groups of {GROUP} columns": grid.group_size != GROUP,
        f"weight scales in {grid.scale_dtype}, not {dtype}": grid.scale_dtype != dtype,
        f"weight rotated by {profile.rotation_kind} blocks of {profile.rotation}": profile.rotation != 0,
        "widths that change while sampling": layer.form.width_table is not None,
    }
    return [reason for reason, is_so in found.items() if is_so]


def _input_reasons(layer: PackedLinear, *, dtype: str) -> list[str]:
    grid = layer.profile.activation
    found = {
        f"inputs of {grid.bits} bits": grid.bits != BITS,
        "inputs with a zero point": not grid.symmetric,
        f"inputs without groups of {GROUP} columns": grid.group_size != GROUP,
        "inputs with static ranges": layer.form.static,
        "ranges of inputs cut by learned factors": not layer.form.static and grid.clip,
        "inputs divided by scales that are rounded before": grid.arithmetic != "unrounded",
        f"scales of inputs in {grid.scale_dtype}, not {dtype}": grid.scale_dtype != dtype,
    }
    return [reason for reason, is_so in found.items() if is_so]


def svdq_output(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The output float32 [M, N'] of stored tensors and inputs float32 [M, K]; columns behind N are padding."""
    return _output(tensors, x, sum_dtype=torch.float32)


def svdq_half_output(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Output of a layer as :func:`svdq_output` gives it, with sums in the scales' half precision as in the kernels."""
    return _output(tensors, x, sum_dtype=tensors["wscales"].dtype)


@torch.no_grad()
def _output(tensors: Mapping[str, Tensor], x: Tensor, *, sum_dtype: torch.dtype) -> Tensor:
    def rounded(value: Tensor) -> Tensor:
        return value.to(sum_dtype).float()

    codes, scale = unpack_weight(tensors["qweight"]), unpack_scale(tensors["wscales"]).float()
    x = pad_matrix(x, x.shape[0], codes.shape[1])
    groups = (x / unpack_vector(tensors["smooth_factor"]).float()).unflatten(-1, (-1, GROUP))
    ratio = (groups.abs().amax(-1, keepdim=True) * groups.new_full((), QMAX).reciprocal()).clamp(min=MIN_SCALE)
    q = (groups * ratio.reciprocal()).round().clamp(-QMAX, QMAX)
    row_scale = ratio.to(tensors["wscales"].dtype).float().squeeze(-1)
    y = x.new_zeros(x.shape[0], codes.shape[0])
    for group in range(scale.shape[1]):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        sums = q[:, group] @ codes[:, columns].float().t()  # whole numbers below 2^24: exact
        if sum_dtype == torch.float32:
            y += sums * row_scale[:, group, None] * scale[:, group]
        else:  # products of two half-precision numbers are exact in float32
            y = rounded(y + rounded(sums) * rounded(row_scale[:, group, None] * scale[:, group]))
    if tensors["proj_down"].shape[1]:
        hidden = rounded(x @ unpack_down(tensors["proj_down"]).float().t())
        y = rounded(y + hidden @ unpack_up(tensors["proj_up"]).float().t())
    return rounded(y + unpack_vector(tensors["bias"]).float()) if "bias" in tensors else y
