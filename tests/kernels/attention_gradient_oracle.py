"""A smooth float64 function that passes through the quantized attention of one head, from kernels/attention.md alone.

Its derivative is what the section "Gradient" states. Everything that was rounded at one point stands in it as a constant:

    x^ = s (x / s + rest)   in range, and s times 127 or -127 outside of it: `rest` is what rounding added, s is smooth in x
    p  = code 2^(x - x0)    the code and the exponent x0 of the point
"""

from __future__ import annotations

import numpy as np
import torch

from tests.kernels.attention_oracle import INFINITY, F, block_probabilities, codes_of, mean_of
from tests.kernels.oracle import hadamard


def rotation_matrix(size):
    return torch.tensor(np.stack([hadamard(row, size) for row in np.eye(size)]), dtype=torch.float64)


def probabilities_of(z, factors, plain=None):
    """Weights float64 [M, N] of the codes, relative to each query's largest exponent.

    Args:
        z: Scores times keys' scales, float32 [M, N].
        factors: Of the queries, [M, 1].
        plain: The type of values that are not quantized.
    """
    codes, exponents = np.zeros(z.shape), np.full(z.shape, -np.inf)
    for row, own in enumerate(z):
        for begin in range(0, z.shape[1], 64):
            here = slice(begin, begin + 64)
            if own[here].max() > -INFINITY:
                codes[row, here], exponents[row, here] = block_probabilities(own[here], factors[row, 0], plain)
    top = exponents.max(1, keepdims=True)
    return codes * np.exp2(np.where(np.isfinite(top), exponents - np.where(np.isfinite(top), top, 0), 0))


class Surrogate:
    """The attention near one point of q float32 [M, D], k and v [N, D] and its clips.

    Args:
        point: q, k and v, numpy.
        seen: bool [M, N].
        spec: factor, smooth_key and rotation, by name; plain: the type of values that are not quantized.
        clips: Factors of queries and of keys.
    """

    def __init__(self, point, *, seen, spec, clips=(1.0, 1.0)):
        self.spec, self.seen = spec, torch.tensor(seen)
        q, k, v = point
        self.matrix = rotation_matrix(spec["rotation"]) if spec["rotation"] else None
        if spec["rotation"]:
            q, k = (np.stack([np.array(hadamard(row, spec["rotation"]), dtype=F) for row in rows]) for rows in (q, k))
        k = k - mean_of(k) if spec["smooth_key"] else k
        self.plain = spec.get("plain")
        v = v if self.plain else v - mean_of(v)
        largest = [np.abs(q).max(1, keepdims=True) * F(clips[0]), np.abs(k).max(1, keepdims=True) * F(clips[1])]
        largest.append(np.abs(v).max(0, keepdims=True))
        self.codes, self.inside = [], []
        scales = []
        for rows, most in zip((q, k, v), largest, strict=True):
            codes, scale = codes_of(rows, most)
            self.codes.append(torch.tensor(codes, dtype=torch.float64))
            self.inside.append(torch.tensor(np.abs(np.rint(rows * (F(1) / scale))) <= 127))
            scales.append(scale)
        z = (self.codes[0].numpy() @ self.codes[1].numpy().T).astype(F) * scales[1][:, 0]
        factors = np.minimum(scales[0] * F(spec["factor"]), F(1) / scales[1].max())
        self.weights = torch.tensor(probabilities_of(np.where(seen, z, -INFINITY).astype(F), factors, self.plain))
        self.rest, self.exponents = [None, None, None], None
        tensors = [torch.tensor(part, dtype=torch.float64) for part in (*point, *clips)]
        self(*tensors)

    def side(self, number, rows, largest):
        """The dequantized rows; the first call sets what rounding added."""
        scale = (largest / 127).clamp(min=1e-8)
        if self.rest[number] is None:
            self.rest[number] = self.codes[number] - rows / scale
        return scale * torch.where(self.inside[number], rows / scale + self.rest[number], self.codes[number])

    def __call__(self, q, k, v, query_clip, key_clip):
        if self.matrix is not None:
            q, k = q @ self.matrix.T, k @ self.matrix.T
        k = k - k.mean(0) if self.spec["smooth_key"] else k
        mean = torch.zeros_like(v[0]) if self.plain else v.mean(0)
        v = v - mean
        query = self.side(0, q, q.abs().amax(1, keepdim=True) * query_clip)
        key = self.side(1, k, k.abs().amax(1, keepdim=True) * key_clip)
        value = v if self.plain else self.side(2, v, v.abs().amax(0, keepdim=True))
        x = (query @ key.T) * self.spec["factor"]
        if self.exponents is None:
            self.exponents = x
        weights = self.weights * torch.exp2(x - self.exponents)
        total = weights.sum(1, keepdim=True)
        is_lonely = total == 0
        y = (weights @ value) / torch.where(is_lonely, torch.ones_like(total), total) + mean
        return torch.where(is_lonely, torch.zeros_like(y), y)


def gradients(point, grad, *, clips=(1.0, 1.0), **keywords):
    """Outputs [M, D] and the gradients of q, k, v and the two clips, all float64."""
    surrogate = Surrogate(point, clips=clips, **keywords)
    tensors = [torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (*point, *clips)]
    y = surrogate(*tensors)
    return y.detach(), torch.autograd.grad(y, tensors, torch.tensor(grad, dtype=torch.float64))
