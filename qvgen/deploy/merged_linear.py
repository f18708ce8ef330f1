"""Packed layers of one input as one call: q, k and v quantize x once.

Sums of an output do not depend on the other outputs, so the merged layer computes the bits of its parts. It holds no
tensor of a checkpoint: the parts keep the canonical codes, and only the backend's copy of the weight is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from qvgen.layers.layer_input import LayerInput
from qvgen.layers.packed_call import call
from qvgen.layers.packed_linear import PackedLinear
from qvgen_kernels import LinearSpec, resolve_kernel
from qvgen_kernels.weight import CanonicalWeight


def can_merge(parts: Sequence[PackedLinear]) -> bool:
    """Whether layers of one input quantize it alike: same form, smoothing and tables; no table of widths, no branch."""
    first = parts[0]
    if any(part.form != first.form or part.kernel != first.kernel for part in parts):
        return False
    if first.form.width_table is not None or first.form.branch_rank or len({part.bias is None for part in parts}) > 1:
        return False
    tables = [name for name in first.form.table_names(first.form.widths[1]) if name is not None]
    names = [*tables, *(["input_scale"] if first.input_scale is not None else [])]
    return all(torch.equal(getattr(part, name), getattr(first, name)) for part in parts for name in names)


def are_hooked(parts: Sequence[PackedLinear]) -> bool:
    """Whether offloading (of accelerate, of diffusers) brings a part's tensors when that part is called, and only then."""
    return any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in parts)


class MergedPackedLinear(nn.Module):
    """One call for several packed layers of one input; their outputs side by side.

    Args:
        parts: Layers for which :func:`can_merge`; they are no submodules of this one.

    Attributes:
        parts: The layers that it stands for.
        takes_input_steps: ``forward`` takes a :class:`~qvgen.layers.layer_input.LayerInput`.
        last_made: As of a PackedLinear.
    """

    takes_input_steps = True

    def __init__(self, parts: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # a tuple: no submodules, so nothing is in a state dict twice
        self._prepacked: tuple[str, LinearSpec, list[Tensor], Tensor | None] | None = None
        self.last_made: tuple[str, bool] | None = None
        self._source: tuple[tuple[torch.device, int, int], ...] = ()

    def prepack_(self) -> str:
        """Derive the backend's copy of the weights now; the first call does it otherwise.

        Returns:
            The name of the backend that runs the layer.
        """
        name = self._prepack()
        for part in self.parts:
            part.settle_()
        return name

    def settle_(self, home: torch.device) -> None:
        """Do what :meth:`PackedLinear.settle_` does, for all parts."""
        if home != self.parts[0].home:
            self._prepacked = None
        for part in self.parts:
            part.settle_(home)

    def _prepack(self) -> str:
        lead = self.parts[0]
        spec = replace(lead.spec, out_features=sum(part.out_features for part in self.parts))
        backend = resolve_kernel(lead.kernel, spec, device=lead.codes.device)
        weights = [CanonicalWeight(*part.canonical()) for part in self.parts]
        weight = backend.prepack_parts(weights, spec=spec)
        biases = [part.bias for part in self.parts if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        self._prepacked, self._source = (backend.name, spec, weight, bias), self._identity()
        self.last_made = (backend.name, lead.visits)
        return backend.name

    @property
    def kernels(self) -> set[str]:
        """The backend for which the weights are prepared now."""
        return set() if self._prepacked is None else {self._prepacked[0]}

    def _identity(self) -> tuple[tuple[torch.device, int, int], ...]:
        """Place and version of the parts' codes, which tell whether they are still those that were prepacked."""
        return tuple(
            (part.codes.device, part.codes.untyped_storage()._cdata, part.codes._version) for part in self.parts
        )

    def forward(self, x: Tensor, *, given: LayerInput | None = None) -> Tensor:
        """Apply the layers to x [B * n, ..., K]: [B * n, ..., sum of their N] in x's dtype, or in that of its steps."""
        if are_hooked(self.parts):
            self._prepacked = self.last_made = None
            return torch.cat([part(x, given=given) for part in self.parts], dim=-1)
        if self._prepacked is None or (not torch.compiler.is_compiling() and self._source != self._identity()):
            self._prepack()
        assert self._prepacked is not None
        name, spec, weight, bias = self._prepacked
        lead = self.parts[0]
        if lead.visits:
            self._prepacked = None
        tensors = lead.call_tensors(lead.row_params(x, bits=lead.form.widths[1]), bias=bias)
        return call(x, (name, spec, weight), tensors, given)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepacked = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.parts[0].in_features} -> {' + '.join(str(part.out_features) for part in self.parts)}"
