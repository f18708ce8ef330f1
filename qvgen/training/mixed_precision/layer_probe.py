"""Quantize one side of a few Linears of a full-precision model inside one window of timesteps, and see what it does.

    weights       y = H (x m) Q(W')^T + bias      the layer's own coordinates: x' = H (x m), W' = H (W / m)
    activations   y = Q(H (x m)) W'^T + bias
    attention     softmax(q k^T) v with 8-bit integers, in all windows (kernels/attention.md)

Forward hooks replace the Linears' outputs for samples whose timestep lies in the window; all else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from qvgen.evaluation.distance import RelativeError
from qvgen.evaluation.mixed_precision_files import ALL_WINDOWS
from qvgen.layers.attention_trial import attending
from qvgen.layers.fake_quant_linear import FakeQuantLinear
from qvgen.layers.fake_quant_product import row_grid, row_qparams, to_grid_input
from qvgen.layers.noise_band import NoiseBand
from qvgen.layers.quant_attention import AttentionProduct
from qvgen.quant.affine import fake_quantize

Side = Literal["weight", "activation", "attention"]


class LayerProbe:
    """The hooks on a model.

    Args:
        model: Full precision; tells ``band`` its timesteps.
        band: Noise bands.
        windows: Window of each band.
    """

    def __init__(self, model: nn.Module, band: NoiseBand, *, windows: Sequence[int]) -> None:
        self._model, self._band = model, band
        self._windows = torch.tensor(windows)
        self._paused = False

    @contextmanager
    def quantizing(self, layers: Mapping[str, FakeQuantLinear], *, side: Side, window: int) -> Iterator[None]:
        """Replace the outputs of some Linears by those of quantized ones as long as the context lasts.

        Args:
            layers: Name of a Linear -> the fake-quantized layer that a PTQ method made of it.
            side: The side that is quantized, weights or activations; the other one stays exact.
            window: Window of timesteps in which it is quantized; ``ALL_WINDOWS``: in all of them.
        """
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._hook(_product(layer, side), window))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attending(self, products: Mapping[str, AttentionProduct]) -> AbstractContextManager[None]:
        """Let attentions compute by these products in all windows, by their names, as long as the context lasts."""
        return attending(self._model, products, active=lambda: not self._paused)

    def _hook(self, product: Callable[[Tensor], Tensor], window: int) -> Callable[..., Tensor | None]:
        def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            del module
            windows = self._windows[self._band.row_index(inputs[0]).cpu()]
            inside = (windows == window) | (window == ALL_WINDOWS)
            if self._paused or not bool(inside.any()):
                return None
            quantized = product(inputs[0]).to(output.dtype)
            if bool(inside.all()):
                return quantized
            return torch.where(inside.to(output.device).view(-1, *[1] * (output.ndim - 1)), quantized, output)

        return replace

    @contextmanager
    def output_change(self, name: str) -> Iterator[RelativeError]:
        """Relative error of a submodule's output against what it would be without quantization, for the same inputs.

        The submodule is run twice; nothing is kept.
        """
        error = RelativeError()

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._paused:
                return
            self._paused = True
            try:
                exact = module(*args, **kwargs)
            finally:
                self._paused = False
            error.update(_tensor(output), _tensor(exact))

        handle: RemovableHandle = self._model.get_submodule(name).register_forward_hook(compare, with_kwargs=True)
        try:
            yield error
        finally:
            handle.remove()


def _tensor(output: Any) -> Tensor:
    """A submodule's output as one tensor: joint attentions give several."""
    return output if isinstance(output, Tensor) else torch.cat([part.flatten() for part in output])


def _product(layer: FakeQuantLinear, side: Side) -> Callable[[Tensor], Tensor]:
    """The layer with one of its sides quantized."""
    weight = layer.quantized_weight() if side == "weight" else layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    grid = layer.profile.activation

    @torch.no_grad()
    def apply(x: Tensor) -> Tensor:
        rows = to_grid_input(x.reshape(-1, layer.in_features), layer.input_scale, profile=layer.profile)
        if side == "activation":
            scale, zero_point = row_qparams(rows, layer.row_params(x, bits=grid.bits), grid)
            rows = fake_quantize(rows, scale=scale, zero_point=zero_point, grid=row_grid(grid))
        return functional.linear(rows, weight, bias).reshape(*x.shape[:-1], layer.out_features)

    return apply
