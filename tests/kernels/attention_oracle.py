"""Quantized attention of one head in numpy, from kernels/attention.md alone: integers in int64, one float32 step a time."""

from __future__ import annotations

import math

import numpy as np

from tests.kernels.oracle import hadamard

F = np.float32
CUBIC = [F(value) for value in (254.98165893554688, 176.78155517578125, 61.86583709716797, 14.068775177001953)]
INFINITY = F(np.inf)


def mean_of(rows):
    total = np.zeros(rows.shape[1], dtype=F)
    for begin in range(0, len(rows), 64):
        block = rows[begin : begin + 64]
        part = block[0].copy()
        for row in block[1:]:
            part = part + row
        total = total + part
    return total / F(len(rows))


def codes_of(rows, largest):
    scale = np.maximum(largest / F(127), F(1e-8))
    return np.clip(np.rint(rows * (F(1) / scale)), -127, 127).astype(np.int64), scale


def two_to(z):
    return F(2.0 ** float(z)) if z >= -64 else F(0)


def block_probabilities(x):
    exponent = F(math.ceil(x.max()))
    codes = np.zeros(len(x), dtype=np.int64)
    for j, score in enumerate(x):
        if score == -INFINITY:
            continue
        t = max(F(score - exponent), F(-16))
        n = F(np.rint(t))
        f = F(t - n)
        c0, c1, c2, c3 = CUBIC
        value = F(F(F(F(F(F(c3 * f) + c2) * f) + c1) * f) + c0)
        codes[j] = int(np.rint(F(value * F(2.0 ** float(n)))))
    return codes, exponent


def dropped(value):
    return np.where(np.abs(value) < F(2.0**-100), F(0), value).astype(F)


def attend(q, k, v, *, seen, factor, smooth_key, rotation, query_clip=1.0, key_clip=1.0):
    """Outputs float32 [M, D] of finite q [M, D], k and v [N, D] in float32; seen is bool [M, N]."""
    if rotation:
        q, k = (np.stack([np.array(hadamard(row, rotation), dtype=F) for row in rows]) for rows in (q, k))
    k = k - mean_of(k) if smooth_key else k
    mean = mean_of(v)
    query, query_scale = codes_of(q, np.abs(q).max(1, keepdims=True) * F(query_clip))
    key, key_scale = codes_of(k, np.abs(k).max(1, keepdims=True) * F(key_clip))
    value, value_scale = codes_of(v - mean, np.abs(v - mean).max(0))
    out = np.zeros_like(q)
    for i in range(len(q)):
        x = (query[i] @ key.T).astype(F) * key_scale[:, 0] * F(query_scale[i, 0] * F(factor))
        x = np.where(seen[i], x, -INFINITY)
        total, weight, top = np.zeros(v.shape[1], dtype=F), F(0), -INFINITY
        for begin in range(0, len(k), 64):
            here = slice(begin, begin + 64)
            if x[here].max() == -INFINITY:
                continue
            codes, exponent = block_probabilities(x[here])
            highest = max(top, exponent)
            shrink = two_to(top - highest) if np.isfinite(top) else F(0)
            grow = two_to(exponent - highest)
            total = dropped(total * shrink) + (codes @ value[here]).astype(F) * grow
            weight = F(F(dropped(F(weight * shrink))) + F(F(codes.sum()) * grow))
            top = highest
        if weight:
            out[i] = total * (F(1) / weight) * value_scale + mean
    return out
