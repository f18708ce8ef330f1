"""Independent oracle of the packed linear, written from kernels/README.md in numpy; imports nothing of ours.

Integers are int64. Every float32 operation of the contract is one float64 operation and one rounding to
float32: float64 has more than 2 * 24 + 2 bits, so the double rounding of + - * / changes nothing (Figueroa
1995) while results are normal numbers, which the tests' inputs keep to. Rows and groups are written as loops.
"""

import numpy as np

from tests.hadamard_oracle import hadamard_factors

FLOOR = {"float32": 1e-8, "bfloat16": 1e-8, "float16": 2.0**-14}
LARGEST = {"bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0}


def r32(value):
    """Round float64 to the nearest float32, kept as float64."""
    return np.asarray(value, np.float64).astype(np.float32).astype(np.float64)


def round_to(value, dtype):
    """Round to a named dtype, kept as float64."""
    if dtype == "float32":
        return r32(value)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return np.asarray(value, np.float64).astype(np.float16).astype(np.float64)
    mantissa, exponent = np.frexp(np.asarray(value, np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)  # bfloat16: 8 significant bits


def hadamard(row, block, kind="sylvester"):
    """The contract's rotation of one float64 row that holds float32 numbers: butterflies, sums by fours, scale."""
    if kind == "regular":
        return regular_hadamard(row, block)
    matrix, exponent = hadamard_factors(block)
    out = np.array(row, np.float64)
    for start in range(0, len(out), 2**exponent):
        stride = 1
        while stride < 2**exponent:
            for first in range(start, start + 2**exponent, 2 * stride):
                for i in range(first, first + stride):
                    out[i], out[i + stride] = r32(out[i] + out[i + stride]), r32(out[i] - out[i + stride])
            stride *= 2
    if len(matrix) > 1:
        for start in range(0, len(out), block):
            runs = out[start : start + block].reshape(len(matrix), -1)
            out[start : start + block] = np.concatenate([sum_by_fours(signs, runs) for signs in matrix])
    return r32(out * r32(block**-0.5))


def regular_hadamard(row, block):
    """The rotation by powers of the regular 4 x 4 matrix, a product of float32 sums for each digit to the base 4."""
    out = np.array(row, np.float64)
    stride = 1
    while stride < block:
        for i in (i for i in range(len(out)) if i // stride % 4 == 0):
            x = out[i : i + 4 * stride : stride].copy()
            plus, minus = (r32(x[0] + x[1]), r32(x[2] + x[3])), (r32(x[0] - x[1]), r32(x[2] - x[3]))
            out[i : i + 4 * stride : stride] = (
                r32(plus[0] + minus[1]),
                r32(plus[0] - minus[1]),
                r32(plus[1] + minus[0]),
                r32(plus[1] - minus[0]),
            )
        stride *= 4
    return r32(out * block**-0.5)


def sum_by_fours(signs, runs):
    """Sum over j of signs[j] * runs[j], four at a time, from left to right."""
    total = None
    for j in range(0, len(signs), 4):
        x = signs[j : j + 4, None] * runs[j : j + 4]
        term = r32(r32(x[0] + x[1]) + r32(x[2] + x[3]))
        total = term if total is None else r32(total + term)
    return total


def quantize_group(values, *, bits, zero_point, scale_dtype, clip_low, clip_high, arithmetic="reciprocal"):
    """Codes, scale and zero point of the values that share a scale (float64 [k], float32 numbers)."""
    if arithmetic != "reciprocal":
        return quantize_as(arithmetic, values, bits=bits, scale_dtype=scale_dtype, clip=clip_high)
    symmetric = zero_point == "none"
    qmax = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    if symmetric:
        low, high = 0.0, r32(np.abs(values).max() * clip_high)
    else:
        low, high = r32(min(values.min(), 0.0) * clip_low), r32(max(values.max(), 0.0) * clip_high)
    scale = max(r32(r32(high - low) / qmax), r32(1e-8))
    if scale_dtype != "float32":
        scale = min(max(round_to(scale, scale_dtype), r32(FLOOR[scale_dtype])), LARGEST[scale_dtype])
    inverse = r32(1.0 / scale)
    if symmetric:
        return np.clip(np.rint(r32(values * inverse)), -qmax, qmax).astype(np.int64), scale, 0
    zero = int(np.clip(np.rint(r32(-low * inverse)), 0, qmax))
    codes = np.clip(np.rint(r32(values * inverse)) + zero, 0, qmax)
    return codes.astype(np.int64), scale, zero


def quantize_as(arithmetic, values, *, bits, scale_dtype, clip):
    """Codes, scale and zero point by another runtime's arithmetic; symmetric."""
    qmax = 2 ** (bits - 1) - 1
    top = r32(np.abs(values).max() * clip)
    if arithmetic == "division":
        scale = r32(max(top, r32(1e-10)) / qmax)
        return np.clip(np.rint(r32(values / scale)), -qmax, qmax).astype(np.int64), scale, 0
    unrounded = max(r32(top * r32(1.0 / qmax)), r32(1e-8))
    codes = np.clip(np.rint(r32(values * r32(1.0 / unrounded))), -qmax, qmax).astype(np.int64)
    scale = round_to(unrounded, scale_dtype)
    if scale_dtype != "float32":
        scale = min(max(scale, r32(FLOOR[scale_dtype])), LARGEST[scale_dtype])
    return codes, scale, 0


def function_of(name, values):
    """GELU by tanh or SiLU in float64, without cancellation: v / (1 + e^-2u)."""
    if name == "none":
        return values
    u = values / 2 if name == "silu" else np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)
    with np.errstate(over="ignore", invalid="ignore"):
        return values / (1 + np.exp(-2 * u))


def finish(y, *, dtype, function="none", gate=None, gate_dtype="float32", residual=None):
    """Compute residual + gate * f(y) as separate operators round it.

    Args:
        y: float64 [M, N], the float32 numbers before the cast.
        dtype: name of x's dtype.
        function: of LinearSpec.
        gate: float64 [S, N] of numbers of gate_dtype, or None.
        gate_dtype: dtype, or "float32".
        residual: float64 [M, N] of numbers of dtype, or None.

    Returns:
        float64 [M, N], numbers of dtype.
    """
    y = round_to(function_of(function, round_to(y, dtype)), dtype)
    inner = dtype if gate is None else gate_dtype
    if gate is not None:
        rows = len(y) // len(gate)
        y = np.stack([round_to(r32(y[m] * gate[m // rows]), inner) for m in range(len(y))])
    if residual is not None:
        y = round_to(r32(residual + y), inner)
    return round_to(y, dtype)


def packed_linear(x, *, codes, scale, zero_point, bias, clip_low, clip_high, spec):
    """The whole operator.

    Args:
        x: float64 [M, K], numbers of the input's dtype.
        codes: int64 [N, K].
        scale: float64 [N, Gw].
        zero_point: float64 [N, Gw], filled with 2^(bits-1) for symmetric weights.
        bias: float64 [N].
        clip_low: float64 [M].
        clip_high: float64 [M].
        spec: dict of the LinearSpec's fields.

    Returns:
        acc int64 [M, N, G]; y float64 [M, N], the float32 numbers before the cast; exact float64 [M, N], from
        the same codes without any rounding; bound float64 [M, N], the sum of the magnitudes of its terms.
    """
    size = spec["weight_group_size"] or spec["activation_group_size"] or spec["in_features"]
    groups = spec["in_features"] // size
    a_size = spec["activation_group_size"] or spec["in_features"]
    outputs = spec["out_features"]
    acc = np.zeros((len(x), outputs, groups), np.int64)
    y, exact, bound = (np.zeros((len(x), outputs)) for _ in range(3))
    for m, row in enumerate(x):
        row = hadamard(row, spec["rotation"], spec.get("rotation_kind")) if spec["rotation"] else row
        parts = [
            quantize_group(
                row[start : start + a_size],
                bits=spec["activation_bits"],
                zero_point=spec["activation_zero_point"],
                scale_dtype=spec["scale_dtype"],
                clip_low=clip_low[m],
                clip_high=clip_high[m],
                arithmetic=spec.get("activation_arithmetic", "reciprocal"),
            )
            for start in range(0, len(row), a_size)
        ]
        operand = np.concatenate([q - z for q, _, z in parts])
        for g in range(groups):
            columns = slice(g * size, (g + 1) * size)
            s_x = parts[g if len(parts) > 1 else 0][1]
            w = g if scale.shape[1] > 1 else 0
            s_w, z_w = scale[:, w], zero_point[:, w]
            if spec["weight_zero_point"] == "real":
                acc[m, :, g] = codes[:, columns] @ operand[columns]
                total = int(operand[columns].sum())
                shifted = r32(r32(acc[m, :, g]) - r32(z_w * r32(total)))
                true = acc[m, :, g] - z_w * total
                magnitude = np.abs(acc[m, :, g]) + np.abs(z_w * total)
            else:
                acc[m, :, g] = (codes[:, columns] - z_w[:, None].astype(np.int64)) @ operand[columns]
                shifted, true = r32(acc[m, :, g]), acc[m, :, g]
                magnitude = np.abs(acc[m, :, g])
            term = r32(r32(shifted * s_x) * s_w)
            y[m] = term if g == 0 else r32(y[m] + term)
            exact[m] += true * s_x * s_w
            bound[m] += magnitude * s_x * s_w
        y[m] = r32(y[m] + bias)
        exact[m] += bias
    return acc, y, exact, bound + np.abs(bias)
