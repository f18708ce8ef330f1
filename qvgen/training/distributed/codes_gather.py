"""Gathering a block's weights as codes of their grid, for passes that read nothing else of them.

    to the network      q = quantize(W rows), 4 bits or 8 of each; scales, zero points and all other parameters as they are
    from the network    What = s (q - z), written where the whole weight would lie

A forward pass reads of a weight W what its quantizer makes of it, and quantize(What) == quantize(W): s (q - z) lies within
rounding of the grid value of q, half a step away from any other. Each process has whole rows of W, and the same rows of s and
z, so that all it needs is at hand. The backward pass reads W itself: which weights lie outside of the grid (their gradient is
0), and how far each is from its grid value (the gradient of s). It gathers W. So do calls between a forward and its backward
pass, with gradient checkpointing: the flag is up only while the model's own forward pass runs.

What a forward pass brings to a device shrinks from 4 bytes of a weight to 1/2 (up to 4 bits) or 1, at the cost of quantizing
the own rows and writing all of them again. The bits of a run stay as they are.

Left out: codes for the backward pass, too. The owner of a row could apply the mask, and form the gradient of s from the sum
of all processes' gradients, but that adds the same numbers in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from qvgen.errors import UserError
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.quant.affine import quantize
from qvgen.quant.grid import Grid
from qvgen.quantizers.weight_lsq import WeightLSQ


def sends_codes(layer: nn.Module) -> bool:
    """Whether all that a layer's forward pass reads of its weight are codes of one grid."""
    return isinstance(layer, FakeQuantLinear) and layer.adapter is None and layer.width_table is None


def code_bytes(bits: int, numel: int) -> int:
    """Bytes that codes take on their way.

    Example:
        >>> code_bytes(4, 10), code_bytes(3, 10), code_bytes(8, 10)
        (5, 5, 10)
    """
    return -(-numel // 2) if bits <= 4 else numel


@dataclass
class ForwardPass:
    """Whether the model's own forward pass runs, in which codes are enough."""

    runs: bool = False


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A parameter's place in a share, in numbers; of a weight, where its quantizer's lie."""

    begin: int
    numel: int
    layer: FakeQuantLinear | None = None
    scale: int = 0
    zero_point: int | None = None

    @property
    def end(self) -> int:
        return self.begin + self.numel

    @property
    def nbytes(self) -> int:
        return 4 * self.numel if self.layer is None else code_bytes(self.layer.weight_quantizer.grid.bits, self.numel)


def _all_gather(output: Tensor, own: Tensor, group: distributed.ProcessGroup, *, async_op: bool = False) -> Any:
    """Gather into one tensor, by a function of torch that has another name in its older versions."""
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return gather(output, own, group=group, async_op=async_op)


class CodesAllGather:
    """The gathering of one unit of FSDP2, of float32 parameters (torch's interface ``AllGather``).

    Args:
        parameters: Modules, names and numbers in a share of the unit's parameters, in the order in which FSDP2 lays them out;
            asked when the first of them are gathered.
        forward: Whether codes are enough.
    """

    def __init__(self, parameters: Callable[[], Sequence[tuple[nn.Module, str, int]]], forward: ForwardPass) -> None:
        self._parameters, self._forward = parameters, forward
        self._segments: list[_Segment] = []

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the whole parameters."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: distributed.ProcessGroup, async_op: bool = False
    ) -> distributed.Work | None:
        """Fill ``output_tensor`` float32 [R n] with the shares of all R processes; this one's is ``input_tensor`` [n]."""
        self._segments = self._segments or list(_segments(self._parameters()))
        assert self._segments[-1].end == input_tensor.numel(), "FSDP2 lays parameters out in another way"
        if not self._forward.runs or all(segment.layer is None for segment in self._segments):
            work: distributed.Work | None = _all_gather(output_tensor, input_tensor, group, async_op=async_op)
            return work
        assert not async_op, "what is gathered is written after it has come"
        sent = torch.cat([_encoded(segment, input_tensor) for segment in self._segments])
        received = sent.new_empty(group.size() * sent.numel())
        _all_gather(received, sent, group)
        for share, whole in zip(received.chunk(group.size()), output_tensor.chunk(group.size()), strict=True):
            self._write_(whole, share)
        return None

    def _write_(self, whole: Tensor, share: Tensor) -> None:
        """One process's share as float32, first what codes are decoded with."""
        parts = dict(zip(self._segments, share.split([segment.nbytes for segment in self._segments]), strict=True))
        for segment, part in parts.items():
            if segment.layer is None:  # its bytes may begin anywhere, and float32 may not
                whole[segment.begin : segment.end].view(torch.uint8).copy_(part)
        for segment, part in parts.items():
            if segment.layer is not None:
                _decode_(segment, part, whole)


def _segments(parameters: Sequence[tuple[nn.Module, str, int]]) -> Iterator[_Segment]:
    begins, begin = {}, 0
    for module, name, numel in parameters:
        begins[id(module), name], begin = begin, begin + numel
    for module, name, numel in parameters:
        begin = begins[id(module), name]
        if name == "weight" and isinstance(module, FakeQuantLinear) and sends_codes(module):
            quantizer = module.weight_quantizer
            zero_point = None if quantizer.zero_point is None else begins[id(quantizer), "zero_point"]
            scale = begins[id(quantizer), "scale"]
            yield _Segment(begin=begin, numel=numel, layer=module, scale=scale, zero_point=zero_point)
        else:
            yield _Segment(begin=begin, numel=numel)


def _qparams(segment: _Segment, share: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the rows of a share, as the grid uses them."""
    assert segment.layer is not None
    quantizer: WeightLSQ = segment.layer.weight_quantizer
    rows = segment.numel // segment.layer.in_features
    shape = (rows, quantizer.scale.shape[1])
    scale, zero_point = (
        None if begin is None else share[begin : begin + math.prod(shape)].reshape(shape)
        for begin in (segment.scale, segment.zero_point)
    )
    assert scale is not None
    return quantizer.usable(scale, zero_point)


def _encoded(segment: _Segment, share: Tensor) -> Tensor:
    """Bytes of a parameter's rows."""
    rows = share[segment.begin : segment.end]
    if segment.layer is None:
        return rows.view(torch.uint8)
    weight, (scale, zero_point) = rows.reshape(-1, segment.layer.in_features), _qparams(segment, share)
    return to_bytes(weight, scale=scale, zero_point=zero_point, grid=segment.layer.weight_quantizer.grid)


def _decode_(segment: _Segment, part: Tensor, whole: Tensor) -> None:
    """Write What where W would lie."""
    assert segment.layer is not None
    scale, zero_point = _qparams(segment, whole)
    grid, columns = segment.layer.weight_quantizer.grid, segment.layer.in_features
    values = from_bytes(part, scale=scale, zero_point=zero_point, grid=grid, columns=columns)
    whole[segment.begin : segment.end].copy_(values.reshape(-1))


def to_bytes(weight: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of a weight float32 [N, K] as uint8 [n], two in a byte up to 4 bits; no wait for the device."""
    codes = quantize(weight, scale=scale, zero_point=zero_point, grid=grid).reshape(-1)
    codes = (codes.to(torch.int16) - grid.qmin).to(torch.uint8)
    if grid.bits > 4:
        return codes
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | (codes[1::2] << 4)


def from_bytes(part: Tensor, *, scale: Tensor, zero_point: Tensor, grid: Grid, columns: int) -> Tensor:
    """What float32 [N, K = columns] of :func:`to_bytes`: s (q - z) with the s that codes were made with.

    A grid of another rounding multiplies codes with a rounded s, which is for values; this one is for codes.
    """
    codes = part if grid.bits > 4 else torch.stack((part & 15, part >> 4), dim=1).reshape(-1)
    codes = codes[: scale.shape[0] * columns].float() + grid.qmin
    groups = codes.reshape(*scale.shape, -1)
    return ((groups - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(-1, columns)


def gather_codes_(model: nn.Module, units: Sequence[Any]) -> None:
    """Have a sharded model's units gathered as codes while its own forward pass runs.

    Args:
        model: Sharded.
        units: Its blocks and itself.

    Raises:
        UserError: No layer of it has codes that stand for its weight, or torch does not let others gather.
    """
    if not all(hasattr(unit, "set_custom_all_gather") for unit in units):
        raise UserError(
            f"strategy.gather=codes needs a torch whose FSDP2 lets others gather, and {torch.__version__} does not; install "
            "a newer one, or write strategy.gather=weights"
        )
    if not any(sends_codes(module) for module in model.modules()):
        raise UserError(
            "strategy.gather=codes and no layer whose weight is what its codes say: adapters and widths that change over "
            "sampling read more of it; write strategy.gather=weights"
        )
    forward = ForwardPass()

    def begin(module: nn.Module, inputs: Any) -> None:
        del module, inputs
        forward.runs = True

    def end(module: nn.Module, inputs: Any, outputs: Any) -> None:
        del module, inputs, outputs
        forward.runs = False

    for unit in units:
        unit.set_custom_all_gather(CodesAllGather(_layout(unit), forward))
    model.register_forward_pre_hook(begin, prepend=True)  # before FSDP2's own, which gathers what is in no block
    model.register_forward_hook(end, always_call=True)


def _layout(unit: Any) -> Callable[[], list[tuple[nn.Module, str, int]]]:
    def parameters() -> list[tuple[nn.Module, str, int]]:
        (group,) = unit._get_fsdp_state()._fsdp_param_groups
        return [
            (p._module_info.module, p._module_info.param_name, p.padded_sharded_param_size.numel())
            for p in group.fsdp_params
        ]

    return parameters
