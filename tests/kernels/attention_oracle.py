"""Quantized attention of one head in numpy, from kernels/attention.md alone: integers in int64, one float32 step a time."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.kernels.oracle import hadamard

F = np.float32
QUADRATIC = [F(value) for value in (1.4485299587249756, -0.6901440024375916, 0.23233066499233246)]
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
    return F(2.0 ** max(float(z), -64.0))


_fmaf = ctypes.CDLL(None).fmaf
_fmaf.argtypes, _fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


def fused(a, b, c):
    """The numbers a b + c, each rounded once, by the C library."""
    return np.array([_fmaf(one, b, c) for one in a], dtype=F)


def exponent_of(largest, factor):
    x = F(largest * factor)
    return F(np.rint(F(x + F(F(abs(x)) * F(2.0**-22) + F(0.5)))))


def block_probabilities(z, factor):
    """Codes and exponent of a block of products z of scores and keys' scales, some of which are finite."""
    exponent = exponent_of(z.max(), factor)
    below = np.minimum(fused(z, F(factor / F(-32)), F(exponent / F(32) + F(0.5))), F(1)).astype(np.float64)
    height = 8 - np.floor((below - 0.5) * 2**24) / 2**19  # above code 1, a multiple of 2^-19
    whole = np.floor(height)
    g = 1 + height - whole
    c0, c1, c2 = map(np.float64, QUADRATIC)  # of 24 bits, and g of 20: sums of products are exact in float64
    quotient = (g * (g * c2 + c1).astype(F).astype(np.float64) + c0).astype(F)
    codes = np.rint(g * np.exp2(whole) * quotient.astype(np.float64))
    return np.where(z == -INFINITY, 0, codes).astype(np.int64), exponent


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
        z = (query[i] @ key.T).astype(F) * key_scale[:, 0]
        z = np.where(seen[i], z, -INFINITY)
        steepness = min(F(query_scale[i, 0] * F(factor)), F(F(1) / key_scale.max()))
        total, weight, top = np.zeros(v.shape[1], dtype=F), F(0), -INFINITY
        for begin in range(0, len(k), 64):
            here = slice(begin, begin + 64)
            if z[here].max() == -INFINITY:
                continue
            codes, exponent = block_probabilities(z[here], steepness)
            highest = max(top, exponent)
            shrink, grow = two_to(top - highest), two_to(exponent - highest)
            total = dropped(total * shrink) + (codes @ value[here]).astype(F) * grow
            weight = F(F(dropped(F(weight * shrink))) + F(F(codes.sum()) * grow))
            top = highest
        if weight:
            out[i] = total * (F(1) / weight) * value_scale + mean
    return out
