"""A feed-forward of packed layers by blocks of rows, whose function is part of the layer behind it.

On a CPU, blocks of ``ROWS`` rows go through both layers one after the other: what lies between them, four times as wide as x,
stays in a cache. Every row is by itself, so the blocks' results are the whole's. Elsewhere the function is computed while
the last layer quantizes its input (kernels/README.md, "Input steps"); its bits are those of torch's operator.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvgen.layers.layer_input import LayerInput, enter, with_function
from qvgen.layers.packed_linear import PackedLinear

ROWS = 512
"""Rows of a block; at 1920 -> 7680 -> 1920 the intermediate takes 8 MB in bfloat16 (docs/log.md)."""


class BlockedFeedForward(nn.Module):
    """A feed-forward of packed layers by blocks of rows; on other devices than a CPU whole.

    Args:
        feed_forward: A FeedForward of diffusers, which calls the layers of its list ``net`` one after the other. The list
            becomes this module's, so that names in a state dict stay.
        function: The function of its first entry, behind that one's layer ``proj``, where its other layer is a packed one
            that can compute it (:class:`~qvgen_kernels.input_steps.InputSteps`); "none": the entries are called as they are.
    """

    def __init__(self, feed_forward: nn.Module, *, function: str = "none") -> None:
        super().__init__()
        net = feed_forward.net
        assert isinstance(net, nn.ModuleList)
        self.net = net
        self._function = None if function == "none" else with_function(function)
        self._last = next((i for i, module in enumerate(net) if isinstance(module, PackedLinear)), len(net) - 1)

    @property
    def is_fused(self) -> bool:
        """Whether :meth:`widen` and :meth:`narrow` are all of it."""
        return self._function is not None

    def forward(
        self, x: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None, given: LayerInput | None = None
    ) -> Tensor:
        """Apply it to x [B * n, ..., K]; [B * n, ..., K'].

        ``gate`` and ``residual`` are those of the last layer, which is a PackedLinear then, for x [B, n, K]; ``given`` are
        steps before the first layer.
        """
        entries = x.shape[0]
        rows = x.numel() // max(1, entries * x.shape[-1])  # rows of each entry along the first dimension
        if x.device.type != "cpu" or x.ndim != 3 or rows <= ROWS:
            return self.narrow(self.widen(x, given), gate=gate, residual=residual)
        # Blocks along the tokens of all samples: a layer finds each row's sample by the first dimension.
        size = max(1, ROWS // entries)
        blocks = []
        for start in range(0, rows, size):
            place = slice(start, start + size)
            of_tokens = gate is not None and gate.shape[1] > 1
            blocks.append(
                self.narrow(
                    self.widen(x[:, place], None if given is None else given.of_tokens(place)),
                    gate=gate[:, place] if gate is not None and of_tokens else gate,
                    residual=None if residual is None else residual[:, place],
                )
            )
        return torch.cat(blocks, dim=1)

    def widen(self, x: Tensor, given: LayerInput | None = None) -> Tensor:
        """The outputs of the first layer, [B * n, ..., wider], with its function where that is not the last layer's."""
        first = self.net[0].proj if self._function is not None else self.net[0]
        y: Tensor = first(x) if given is None else enter(first, x, given)
        return y

    def narrow(self, x: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The rest, for outputs of :meth:`widen`."""
        tail = {} if gate is None and residual is None else {"gate": gate, "residual": residual}
        if self._function is not None:
            y: Tensor = self.net[self._last](x, given=self._function, **tail)
            return y
        for module in self.net[1:-1]:
            x = module(x)
        y = self.net[-1](x, **tail)
        return y
