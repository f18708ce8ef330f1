"""STDiT3 and the temporal VAE of Open-Sora 1.2 in float64 from a dictionary of tensors with the published names.

Written from the published architecture alone: nothing of qvgen is imported. Samples, tokens and heads are taken one by one
where that is plainer than a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import conv3d, group_norm, pad

State = Mapping[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def mlp(state: State, name: str, x: Tensor) -> Tensor:
    return linear(state, f"{name}.fc2", gelu_tanh(linear(state, f"{name}.fc1", x)))


def embedded(state: State, name: str, value: float) -> Tensor:
    """An MLP over 128 cosines and 128 sines of a number."""
    angles = value * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)])
    return linear(state, f"{name}.mlp.2", silu(linear(state, f"{name}.mlp.0", waves)))


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.T / math.sqrt(query.shape[-1])
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True) @ value


def turned(x: Tensor, frequencies: Tensor) -> Tensor:
    """Each pair of neighbouring channels as a complex number, times e^(i place frequency)."""
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies)
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).reshape(len(x), -1)


def self_attention(state: State, name: str, x: Tensor, *, heads: int, rotary: bool) -> Tensor:
    """Of tokens [L, C]."""
    size = x.shape[-1]
    parts = linear(state, f"{name}.qkv", x).split(size, dim=-1)
    outputs = []
    for head in range(heads):
        query, key, value = (part[:, head * size // heads : (head + 1) * size // heads] for part in parts)
        turns = []
        for part, kind in ((query, "q_norm"), (key, "k_norm")):
            normed = part / torch.sqrt((part**2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.{kind}.weight"]
            turns.append(turned(normed, state["rope.freqs"]) if rotary else normed)
        outputs.append(softmax_attention(*turns, value))
    return linear(state, f"{name}.proj", torch.cat(outputs, dim=-1))


def cross_attention(state: State, name: str, x: Tensor, text: Tensor, *, heads: int) -> Tensor:
    """Of tokens [N, C] to a caption's own tokens [L, C]."""
    size = x.shape[-1]
    query = linear(state, f"{name}.q_linear", x)
    key, value = linear(state, f"{name}.kv_linear", text).split(size, dim=-1)
    outputs = []
    for head in range(heads):
        part = slice(head * size // heads, (head + 1) * size // heads)
        outputs.append(softmax_attention(query[:, part], key[:, part], value[:, part]))
    return linear(state, f"{name}.proj", torch.cat(outputs, dim=-1))


def block(state: State, name: str, x: Tensor, text: Tensor, modulation: Tensor, *, heads: int) -> Tensor:
    """A spatial or temporal block on tokens [T, S, C]."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = state[f"{name}.scale_shift_table"] + modulation
    inner = layer_norm(x) * (1 + scale) + shift
    if name.startswith("temporal"):
        columns = [
            self_attention(state, f"{name}.attn", inner[:, s], heads=heads, rotary=True) for s in range(x.shape[1])
        ]
        inner = torch.stack(columns, dim=1)
    else:
        inner = torch.stack(
            [self_attention(state, f"{name}.attn", frame, heads=heads, rotary=False) for frame in inner]
        )
    x = x + gate * inner
    tokens = x.reshape(-1, x.shape[-1])
    x = x + cross_attention(state, f"{name}.cross_attn", tokens, text, heads=heads).reshape(x.shape)
    return x + mlp_gate * mlp(state, f"{name}.mlp", layer_norm(x) * (1 + mlp_scale) + mlp_shift)


def places(rows: int, columns: int, size: int, *, pixels: tuple[int, int]) -> Tensor:
    """Positions [S, C]: the column's sinusoids, then the row's, in parts of the picture."""
    scale = math.sqrt(pixels[0] * pixels[1]) / 512
    base = round(math.sqrt(rows * columns))
    frequencies = 1 / 10000 ** (torch.arange(0, size // 2, 2, dtype=torch.float64) / (size // 2))

    def waves(place: float) -> Tensor:
        return torch.cat([torch.sin(place * frequencies), torch.cos(place * frequencies)])

    return torch.stack([
        torch.cat([waves(w / scale * base / columns), waves(h / scale * base / rows)])
        for h in range(rows)
        for w in range(columns)
    ])  # fmt: skip


def stdit3(state: State, latents: Tensor, *, timestep: float, fps: float, text: Tensor, heads: int) -> Tensor:
    """The output [2 C, F, h, w] for one sample [C, F, h, w], a caption's own tokens [L, D] and numbers."""
    channels, frames, height, width = latents.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    padded = torch.zeros(channels, frames, 2 * rows, 2 * columns, dtype=torch.float64)
    padded[:, :, :height, :width] = latents
    kernel = state["x_embedder.proj.weight"]
    size = len(kernel)
    x = torch.zeros(frames, rows * columns, size, dtype=torch.float64)
    for h in range(rows):
        for w in range(columns):
            patch = padded[:, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
            x[:, h * columns + w] = (
                torch.einsum("cfij,ocij->fo", patch, kernel[:, :, 0]) + state["x_embedder.proj.bias"]
            )
    x = x + places(rows, columns, size, pixels=(8 * height, 8 * width))
    time = embedded(state, "t_embedder", timestep) + embedded(state, "fps_embedder", fps)
    modulation = linear(state, "t_block.1", silu(time)).reshape(6, size)
    text = mlp(state, "y_embedder.y_proj", text)
    for index in range(sum(name.startswith("spatial") and name.endswith("scale_shift_table") for name in state)):
        for kind in ("spatial_blocks", "temporal_blocks"):
            x = block(state, f"{kind}.{index}", x, text, modulation, heads=heads)
    shift, scale = state["final_layer.scale_shift_table"] + time
    made = linear(state, "final_layer.linear", layer_norm(x) * (1 + scale) + shift)
    output = torch.zeros(2 * channels, frames, 2 * rows, 2 * columns, dtype=torch.float64)
    for h in range(rows):
        for w in range(columns):
            tile = made[:, h * columns + w].reshape(frames, 2, 2, 2 * channels)
            output[:, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2] = tile.permute(3, 0, 1, 2)
    return output[:, :, :height, :width]


def causal(state: State, name: str, x: Tensor, step: int = 1) -> Tensor:
    kernel = state[f"{name}.conv.weight"]
    side, before = kernel.shape[-1] // 2, kernel.shape[2] - step
    return conv3d(
        pad(x, (side, side, side, side, before, 0)), kernel, state.get(f"{name}.conv.bias"), stride=(step, 1, 1)
    )


def residual(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    inner = x
    for part in ("1", "2"):
        normed = group_norm(inner, groups, state[f"{name}.norm{part}.weight"], state[f"{name}.norm{part}.bias"])
        inner = causal(state, f"{name}.conv{part}", silu(normed))
    return inner + (causal(state, f"{name}.conv3", x) if f"{name}.conv3.conv.weight" in state else x)


def residuals(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    index = 0
    while f"{name}.{index}.norm1.weight" in state:
        x = residual(state, f"{name}.{index}", x, groups)
        index += 1
    return x


def temporal_mean(state: State, window: Tensor, groups: int) -> Tensor:
    """The mean of the latents of one window [1, C, F, h, w]; names begin with ``temporal_vae.``."""
    frames = math.ceil(window.shape[2] / 4) * 4
    x = torch.cat([torch.zeros_like(window[:, :, :1])] * (frames - window.shape[2]) + [window], dim=2)
    name = "temporal_vae.encoder"
    x = causal(state, f"{name}.conv_in", x)
    for level in range(4):
        x = residuals(state, f"{name}.block_res_blocks.{level}", x, groups)
        if level in (1, 2):
            x = causal(state, f"{name}.conv_blocks.{level}", x, step=2)
    x = residuals(state, f"{name}.res_blocks", x, groups)
    x = silu(group_norm(x, groups, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"]))
    return causal(state, "temporal_vae.quant_conv", causal(state, f"{name}.conv2", x))[:, : window.shape[1]]


def temporal_frames(state: State, latents: Tensor, frames: int, groups: int) -> Tensor:
    """The frames of one window of latents [1, C, f, h, w]."""
    name = "temporal_vae.decoder"
    x = causal(state, f"{name}.conv1", causal(state, "temporal_vae.post_quant_conv", latents))
    x = residuals(state, f"{name}.res_blocks", x, groups)
    for level in (3, 2, 1, 0):
        x = residuals(state, f"{name}.block_res_blocks.{level}", x, groups)
        if level in (3, 2):
            made = causal(state, f"{name}.conv_blocks.{level - 1}", x)
            x = torch.stack([made[:, 0::2], made[:, 1::2]], dim=3).flatten(2, 3)  # channels 2 c and 2 c + 1 are frames
    x = silu(group_norm(x, groups, state[f"{name}.norm1.weight"], state[f"{name}.norm1.bias"]))
    return causal(state, f"{name}.conv_out", x)[:, :, -frames:]
