"""Two layers of quantized attention learn what two layers of exact attention learn, without a QK norm.

300 steps on the outputs of a fixed random teacher. Keys have a large bias, as video models' have: the run without smooth_key
shows what that costs. QVGEN_LONG_TESTS=1 asks for it; `python -m tests.kernels.test_attention_training` prints the losses.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, scaled_dot_product_attention

from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention

HEADS, HEAD_SIZE, TOKENS, STEPS = 2, 32, 96, 300
WIDTH = HEADS * HEAD_SIZE


class Layer(nn.Module):
    """Attention with a residual and learned clips; exact where there is no spec."""

    def __init__(self, spec: AttentionSpec | None) -> None:
        super().__init__()
        self.spec = spec
        self.inputs, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.clips = nn.Parameter(torch.full((2, HEADS), 4.0))
        with torch.no_grad():
            self.inputs.weight[: 2 * WIDTH] *= 3.0  # scores with a spread of some units
            self.inputs.bias[WIDTH : 2 * WIDTH] += 6.0 * torch.randn(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inputs(x).view(*x.shape[:2], 3, HEADS, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        if self.spec is None:
            y = scaled_dot_product_attention(q, k, v)
        else:
            y = attention(q, k, v, spec=self.spec, tensors=AttentionTensors(*self.clips.sigmoid().unbind()))
        return x + self.output(y.transpose(1, 2).flatten(2))


def build(seed: int, spec: AttentionSpec | None) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Layer(spec), Layer(spec))


@functools.cache
def losses(smooth_key: bool | None) -> tuple[list[float], float]:
    """Losses of all steps and the mean length of a gradient; exact attention for None."""
    spec = None if smooth_key is None else AttentionSpec(HEAD_SIZE, smooth_key=smooth_key)
    teacher, student = build(1, None), build(2, spec)
    draw = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    found, lengths = [], []
    for _ in range(STEPS):
        x = torch.randn(4, TOKENS, WIDTH, generator=draw)
        with torch.no_grad():
            wanted = teacher(x)
        loss = mse_loss(student(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        lengths.append(
            torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None]).item()
        )
        optimizer.step()
        found.append(loss.item())
    return found, sum(lengths) / STEPS


def end(found: list[float]) -> float:
    return sum(found[-20:]) / 20


@pytest.mark.parametrize("smooth_key", [True, False])
def test_losses_follow_those_of_exact_attention(smooth_key: bool) -> None:
    exact, length = losses(None)
    found, own_length = losses(smooth_key)
    assert end(exact) < 0.6 * exact[0]  # something is learned
    assert end(found) < (1.02 if smooth_key else 1.2) * end(exact)
    assert own_length == pytest.approx(length, rel=0.05 if smooth_key else 0.3)


if __name__ == "__main__":
    for kind in (None, True, False):
        every, norm = losses(kind)
        shown = ", ".join(f"{every[step]:.5f}" for step in (0, 50, 100, 200))
        print(f"smooth_key={kind}: steps 0, 50, 100, 200: {shown}; end {end(every):.5f}; gradient {norm:.4f}")  # noqa: T201
