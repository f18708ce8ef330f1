"""Quantized attention of one head in numpy, from kernels/attention.md alone: integers in int64, one float32 step a time."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.kernels.oracle import hadamard

F = np.float32
QUADRATIC = [F(value) for value in (1.4485299587249756, -0.6901440024375916, 0.23233066499233246)]
CUBIC = [F(value) for value in (1.775614619255066, -1.3773075342178345, 0.7074757218360901, -0.10644568502902985)]
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


def rounded(numbers, plain):
    """Whole numbers below 2^16 in the type of plain values, as float64."""
    if plain == "float16":
        return numbers.astype(np.float16).astype(np.float64)
    if plain == "bfloat16":  # eight digits; np.rint takes halves to even
        unit = np.exp2(np.maximum(np.floor(np.log2(np.maximum(numbers, 1))) - 7, 0))
        return np.rint(numbers / unit) * unit
    return numbers


def block_probabilities(z, factor, plain=None):
    """Codes and exponent of a block of products z of scores and keys' scales, some of which are finite.

    With ``plain``, the type of values, probabilities as whole numbers of that type, float64.
    """
    exponent = exponent_of(z.max(), factor)
    below = np.minimum(fused(z, F(factor / F(-32)), F(exponent / F(32) + F(0.5))), F(1)).astype(np.float64)
    height = (15 if plain else 8) - np.floor((below - 0.5) * 2**24) / 2**19  # above code 1, a multiple of 2^-19
    whole = np.floor(height)
    g = 1 + height - whole
    *others, quotient = map(
        np.float64, CUBIC if plain else QUADRATIC
    )  # of 24 bits, g of 20: sums of products are exact
    for coefficient in reversed(others):
        quotient = (g * quotient + coefficient).astype(F).astype(np.float64)
    codes = np.where(z == -INFINITY, 0, np.rint(g * np.exp2(whole) * quotient))
    return rounded(codes, plain) if plain else codes.astype(np.int64), exponent


def sums_of(codes, values, plain):
    """Sums of a block: of integers, or of float32 products one after another."""
    if not plain:
        return (codes @ values).astype(F)
    total = np.zeros(values.shape[1], dtype=F)
    for p, row in zip(codes.astype(F), values, strict=True):
        total = total + p * row
    return total


def dropped(value):
    return np.where(np.abs(value) < F(2.0**-100), F(0), value).astype(F)


def attend(q, k, v, *, seen, factor, smooth_key, rotation, query_clip=1.0, key_clip=1.0, plain=None):
    """Outputs float32 [M, D] of finite q [M, D], k and v [N, D] in float32; seen is bool [M, N].

    ``plain`` is the type of values that are not quantized, by name; None: they are.
    """
    if rotation:
        q, k = (np.stack([np.array(hadamard(row, rotation), dtype=F) for row in rows]) for rows in (q, k))
    k = k - mean_of(k) if smooth_key else k
    mean = np.zeros(v.shape[1], dtype=F) if plain else mean_of(v)
    query, query_scale = codes_of(q, np.abs(q).max(1, keepdims=True) * F(query_clip))
    key, key_scale = codes_of(k, np.abs(k).max(1, keepdims=True) * F(key_clip))
    value, value_scale = (v, F(1)) if plain else codes_of(v - mean, np.abs(v - mean).max(0))
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
            codes, exponent = block_probabilities(z[here], steepness, plain)
            highest = max(top, exponent)
            shrink, grow = two_to(top - highest), two_to(exponent - highest)
            total = dropped(total * shrink) + sums_of(codes, value[here], plain) * grow
            weight = F(F(dropped(F(weight * shrink))) + F(F(codes.sum()) * grow))
            top = highest
        if weight:
            out[i] = total * (F(1) / weight) * value_scale + mean
    return out
