"""The layers of transformers in float64 and numpy, one sample at a time; nothing of qvgen is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.special import erf

Weights = dict[str, np.ndarray]


def random_file(shapes: dict[str, tuple[int, ...]], path: Path, *, seed: int = 0, key: str | None = "model") -> Weights:
    """Write random tensors of these names and shapes as a published checkpoint is written; returns them in float64.

    Normalizations scale by about 1 and biases are small, so that what a network sees decides what it gives.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, value in tensors.items():
        if name.endswith("bias"):
            value.mul_(0.1)
        elif "norm" in name.lower() or ".ln_" in name:
            value.add_(1)
    torch.save(tensors if key is None else {key: tensors}, path)
    return {name: value.double().numpy() for name, value in tensors.items()}


def under(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """W x + b of rows."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def layer_norm(x: np.ndarray, weights: Weights, name: str, *, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * w + b of rows."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """X times the normal distribution function."""
    return x * (1 + erf(x / np.sqrt(2))) / 2


def softmax(x: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, heads: int, added: np.ndarray | float = 0.0
) -> np.ndarray:
    """Heads of rows [L, C]; ``added`` [heads or 1, L, S] to the scores."""
    size = q.shape[-1] // heads
    added = np.broadcast_to(added, (heads, len(q), len(k)))
    parts = [slice(head * size, head * size + size) for head in range(heads)]
    mixed = [softmax(q[:, p] @ k[:, p].T / np.sqrt(size) + added[head]) @ v[:, p] for head, p in enumerate(parts)]
    return np.concatenate(mixed, -1)


def patches(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Products of the patches of [3, H, W] with kernels [C, 3, P, P], row by row: [patches, C]."""
    size = kernel.shape[-1]
    places = [(y, x) for y in range(0, image.shape[1], size) for x in range(0, image.shape[2], size)]
    return np.array([[(image[:, y : y + size, x : x + size] * k).sum() for k in kernel] for y, x in places])
