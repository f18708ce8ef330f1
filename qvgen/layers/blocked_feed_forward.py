"""A feed-forward of packed layers by blocks of rows.

On a CPU, blocks of ``ROWS`` rows go through both layers one after the other: what lies between them, four times as wide as x,
stays in a cache. Every row is by itself, so the blocks' results are the whole's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 512
"""Rows of a block; at 1920 -> 7680 -> 1920 the intermediate takes 8 MB in bfloat16 (docs/log.md)."""


class BlockedFeedForward(nn.Module):
    """A feed-forward of packed layers by blocks of rows; on other devices than a CPU whole.

    Args:
        feed_forward: A FeedForward of diffusers, which calls the layers of its list ``net`` one after the other. The list
            becomes this module's, so that names in a state dict stay.
    """

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        net = feed_forward.net
        assert isinstance(net, nn.ModuleList)
        self.net = net

    def forward(self, x: Tensor, *, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Apply it to x [B * n, ..., K]; [B * n, ..., K'].

        ``gate`` and ``residual`` are those of the last layer, which is a PackedLinear then, for x [B, n, K].
        """
        entries = x.shape[0]
        rows = x.numel() // max(1, entries * x.shape[-1])  # rows of each entry along the first dimension
        if x.device.type != "cpu" or x.ndim != 3 or rows <= ROWS:
            return self._whole(x, gate, residual)
        # Blocks along the tokens of all samples: a layer finds each row's sample by the first dimension.
        size = max(1, ROWS // entries)
        blocks = []
        for start in range(0, rows, size):
            place = slice(start, start + size)
            of_tokens = gate is not None and gate.shape[1] > 1
            blocks.append(
                self._whole(
                    x[:, place],
                    gate[:, place] if gate is not None and of_tokens else gate,
                    None if residual is None else residual[:, place],
                )
            )
        return torch.cat(blocks, dim=1)

    def _whole(self, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        for module in self.net[:-1]:
            x = module(x)
        tail = {} if gate is None and residual is None else {"gate": gate, "residual": residual}
        y: Tensor = self.net[-1](x, **tail)
        return y
