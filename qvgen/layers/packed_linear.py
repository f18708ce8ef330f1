"""A Linear that runs on packed integer codes: what fold makes of a FakeQuantLinear, and what a checkpoint loads into.

The canonical tensors (row-major codes, scales, zero points; kernels/README.md) are the layer's, so the state dict is the
checkpoint. A kernel backend derives its own order of bytes from them once on each device that the layer lives on; that copy
is in no state dict, and goes when the layer is moved. Where something brings tensors for a call alone, as offloading does
without telling the layer, the copy lives as long as the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor, nn

from qvgen.layers.bit_choice import by_widths, rows_of
from qvgen.layers.branch import BRANCH_DTYPE, check_phi_is_gone, packed_floats
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import input_codes, to_grid_input
from qvgen.layers.layer_form import LayerForm
from qvgen.layers.layer_input import LayerInput
from qvgen.layers.layer_spec import layer_spec
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.packed_call import Prepacked, call, call_tensors, equal_weights
from qvgen.layers.packed_weight import ABOVE_ZERO, PackedWeight
from qvgen.layers.weight_rows import WeightRows, pack_weight_
from qvgen.quant.width_table import Widths
from qvgen.quantizers.activation_static import whole_zero_point
from qvgen_kernels import LinearSpec, LinearTensors, prepack, resolve_kernel


class PackedLinear(PackedWeight):
    """Integer Linear.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether the layer has one.
        form: Grids, table of widths, smoothing and branch.
        noise_band: Shared with the other layers of the model.
        kernel: Name of a kernel backend, or ``auto``.
        device: Where the empty buffers are made (``meta`` for shapes alone).

    Attributes:
        bias: Parameter float32 [N], frozen, or None.
        clip_low: buffer float32 [num_bands], factors in (0, 1); None for symmetric activations and static ranges.
        clip_high: buffer float32 [num_bands]; None for static ranges and grids without clips.
        static_scale: buffer float32 [num_bands]; None for dynamic ranges.
        static_zero_point: buffer float32 [num_bands], not rounded; None for dynamic ranges and symmetric activations.
        clip_low_8, ...: The tables of other activation widths of the table, by width.
        other_weights: The codes of other weight widths of the table, by width; None where there are none.
        input_scale: buffer float32 [K] or None.
        branch_down, branch_up: buffers bfloat16 [r, K] and [N, r] or None.
        takes_input_steps: ``forward`` takes a :class:`LayerInput`.
        weight_error: |Q(W) - W|^2 / |W|^2 against the master weight that was folded; None if not known.
        home: Where the tensors stay between calls; meta before any are loaded.
        last_made: Backend of the last copy that was made of the weight, and whether it was for a call alone.
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None
    branch_down: Tensor | None
    branch_up: Tensor | None
    last_made: tuple[str, bool] | None
    takes_input_steps = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        form: LayerForm,
        noise_band: NoiseBand,
        kernel: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(in_features, out_features, grid=form.profile.weight, device=device)
        self.form, self.profile, self.noise_band, self.kernel = form, form.profile, noise_band, kernel
        self.register_buffer("input_scale", torch.ones(in_features, device=device) if form.input_scale else None)
        rank = form.branch_rank
        for name, shape in (("branch_down", (rank, in_features)), ("branch_up", (out_features, rank))):
            self.register_buffer(name, torch.zeros(shape, dtype=BRANCH_DTYPE, device=device) if rank else None)
        if form.width_table is not None:
            form.width_table.check_fits(form.profile, num_bands=noise_band.num_bands)
        self._specs = {
            widths: layer_spec(form, in_features=in_features, out_features=out_features, widths=widths)
            for widths in product(form.weight_widths, form.activation_widths)
        }
        for bits in form.activation_widths:
            for name in filter(None, form.table_names(bits)):
                self.register_buffer(name, torch.ones(noise_band.num_bands, device=device))
        others = {
            str(bits): PackedWeight(
                in_features, out_features, grid=replace(form.profile.weight, bits=bits), device=device
            )
            for bits in form.weight_widths
            if bits != form.profile.weight.bits
        }
        self.other_weights = nn.ModuleDict(others) if others else None
        # A Parameter, though nothing trains it: diffusers asks modules for the dtype of their first parameter.
        zeros = torch.zeros(out_features, device=device)
        self.register_parameter("bias", nn.Parameter(zeros, requires_grad=False) if bias else None)
        self.weight_error: float | None = None
        # diffusers asks modules for the dtype of their first parameter, which codes do not tell
        self._parameters = {"bias": self._parameters.pop("bias"), **self._parameters}
        self._prepacked: dict[Widths, Prepacked] = {}
        self.home, self.last_made = self.codes.device, None

    @property
    def spec(self) -> LinearSpec:
        """The kernels' description of the layer at the profile's widths."""
        return self._specs[self.form.widths]

    @property
    def kernels(self) -> set[str]:
        """Backends for which the weight is prepared now, at any of its widths."""
        return {name for name, _, _ in self._prepacked.values()}

    @classmethod
    @torch.no_grad()
    def from_fake_quant(
        cls,
        layer: FakeQuantLinear,
        *,
        kernel: str = "auto",
        weight: WeightRows | None = None,
        device: str | None = None,
    ) -> Self:
        """Pack the codes that a layer was trained with. Its Phi must be gone, or one to be kept: it joins the branch.

        ``weight`` stands for the layer's own where that is not in memory. On the ``device`` meta it gets no values.

        Raises:
            ValueError: Phi still has rank.
        """
        check_phi_is_gone(layer)
        device = device or str(layer.weight_quantizer.scale.device)
        sizes: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features}
        form, bias = LayerForm.folded(layer), layer.bias is not None
        packed = cls(**sizes, bias=bias, form=form, noise_band=layer.noise_band, kernel=kernel, device=device)
        if packed.codes.is_meta:
            return packed
        pack_weight_(packed, layer, layer.weight if weight is None else weight)
        for bits, quantizer in layer.activation_quantizers().items():
            for name, table in zip(packed.form.table_names(bits), quantizer.tables(), strict=True):
                if name is not None:
                    getattr(packed, name).copy_(table)
        for name, value in packed_floats(layer).items():
            getattr(packed, name).copy_(value)
        return packed

    def weight_of(self, bits: int) -> PackedWeight:
        """The codes of one of the layer's weight widths."""
        if bits == self.profile.weight.bits:
            return self
        assert self.other_weights is not None
        other = self.other_weights[str(bits)]
        assert isinstance(other, PackedWeight)
        return other

    def value_ranges(self) -> dict[str, tuple[float, float]]:
        """See :meth:`PackedWeight.value_ranges`; of a smoothing vector it is the magnitude that counts."""
        ranges = super().value_ranges()
        if self.input_scale is not None:
            ranges["input_scale"] = ABOVE_ZERO
        for bits in self.form.activation_widths:
            for name in filter(None, self.form.table_names(bits)):
                if name != "static_zero_point":
                    ranges[name] = ABOVE_ZERO if self.form.static else (0.0, 1.0)
        return ranges

    def nbytes(self) -> int:
        """Bytes of all tensors that a checkpoint holds of this layer."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def prepack_(self, widths: Widths | None = None) -> str:
        """Derive the backend's copy of the weight now; the first call of the layer at these widths does it otherwise.

        Returns the name of the backend; raises what :func:`qvgen_kernels.resolve_kernel` does where it does not run here.
        """
        name = self._prepack(widths or self.form.widths)
        self.settle_()
        return name

    def settle_(self, home: torch.device | None = None) -> None:
        """Take it that the tensors stay where they are, as after moving, or in a home from which each call brings them."""
        if home is not None and home != self.home:
            self._prepacked = {}
        self.home = self.codes.device if home is None else home

    @property
    def visits(self) -> bool:
        """Whether the codes are where they are for a call alone, so that no copy of them is to be kept there."""
        offload = getattr(getattr(self, "_hf_hook", None), "offload", None)
        if offload is not None:
            return bool(offload)  # accelerate takes them away after each call, or has put them there to stay
        return self.home.type != "meta" and self.codes.device != self.home

    def _prepack(self, widths: Widths) -> str:
        spec, source = self._specs[widths], self.weight_of(widths[0])
        name = resolve_kernel(self.kernel, spec, device=self.codes.device).name
        planes, scale, zero_point = self.canonical() if source is self else source()
        weight = prepack(planes, scale=scale, zero_point=zero_point, spec=spec, kernel=name)
        for (other, _), (other_name, _, theirs) in self._prepacked.items():
            # Most backends order a weight alike for all widths of the activations: one copy serves them all.
            if other == widths[0] and other_name == name and equal_weights(theirs, weight):
                weight = theirs
        self._prepacked[widths], self.last_made = (name, spec, weight), (name, self.visits)
        return name

    @torch.no_grad()
    def row_params(self, x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
        """The two numbers of each row of an input [B * n, ..., K] that its quantization needs, float32 [M, 1] each.

        They are the clip factors of the minimum and the maximum, or the static scale and zero point.
        """
        names, repeat = self.form.table_names(bits), math.prod(x.shape[1:-1])
        values = [None if name is None else self.noise_band.row_values(getattr(self, name), x) for name in names]
        first, second = values
        if self.form.static:
            assert first is not None
            second = torch.zeros_like(first) if second is None else second
            second = whole_zero_point(second, self.profile.activation)
        else:
            second = torch.ones(len(x), device=x.device) if second is None else second
            first = torch.ones_like(second) if first is None else first
        return first.repeat_interleave(repeat).unsqueeze(-1), second.repeat_interleave(repeat).unsqueeze(-1)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of an input [B * n, ..., K] at the profile's width, [M, K]; for counting differences."""
        grid = self.profile.activation
        rows = to_grid_input(x.reshape(-1, self.in_features), self.input_scale, profile=self.profile)
        return input_codes(rows, self.row_params(x, bits=grid.bits), grid)

    def forward(  # type: ignore[override]
        self, x: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None, given: LayerInput | None = None
    ) -> Tensor:
        """Apply the layer to x [B * n, ..., K], rows ordered by sample: [B * n, ..., N] in x's dtype.

        ``residual + gate * y`` for a gate [B * n, 1, N] or [B * n, ..., N] and a residual like y; of the operator's types.
        ``given`` are steps that x goes through first, whose type the outputs have.
        """

        def run(part: Tensor, index: Tensor | None, widths: Widths) -> Tensor:
            tail = [value if value is None or index is None else value[index] for value in (gate, residual)]
            own = None if given is None else given.of(index)
            return self._product(part, rows_of(self.row_params(x, bits=widths[1]), x, index), widths, tail, own)

        return by_widths(x, run, width_table=self.form.width_table, profile=self.profile, noise_band=self.noise_band)

    def _product(
        self,
        x: Tensor,
        params: tuple[Tensor, Tensor],
        widths: Widths,
        tail: Sequence[Tensor | None],
        given: LayerInput | None,
    ) -> Tensor:
        ready, visits = self._prepacked.get(widths), self.visits
        if ready is None or ready[2][0].device != self.codes.device:
            if visits:
                self._prepacked = {}  # those of another device
            self._prepack(widths)
        prepacked = self._prepacked[widths]
        if visits:
            self._prepacked = {}
        gate, residual = (None if value is None else value.flatten(0, -2) for value in tail)
        tensors = self.call_tensors(params, bias=self.bias)._replace(gate=gate, residual=residual)
        return call(x, prepacked, tensors, given)

    def call_tensors(self, params: tuple[Tensor, Tensor], *, bias: Tensor | None) -> LinearTensors:
        """The tensors of one call of the operator, made from the :meth:`row_params` of its rows."""
        floats = (self.input_scale, self.branch_down, self.branch_up)
        return call_tensors(params, form=self.form, bias=bias, floats=floats)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A scale in half precision would no longer be the one that was trained: only the device may change.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self._prepacked = {}
        super()._apply(keep_dtype, recurse)
        self.settle_()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self._prepacked = {}
        super()._load_from_state_dict(*args)
        self.settle_()

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, {self.profile.name} {self.profile.label}"
