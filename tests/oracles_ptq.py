"""Float64 oracles of the PTQ methods, from the papers, in plain loops. Imports nothing of qvgen.

Kinds of zero point: "integer", "real", "none" (symmetric), as in oracles.py.
"""

from __future__ import annotations

import itertools

import numpy as np

from tests.oracles import limits


def smoothquant_scale(activation_max, weight, alpha):
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (2211.10438, Eq. 4): X is divided by it."""
    return [
        a**alpha / max(abs(w) for w in column) ** (1 - alpha)
        for a, column in zip(activation_max, weight.T, strict=True)
    ]


def nearest_code(value, scale, zero, *, bits, kind):
    """Code of one value, and how far its rounding is from a tie (in codes)."""
    low, high = limits(bits, kind)
    position = value / scale + (zero if kind == "real" else 0.0)
    code = np.rint(position) + (0.0 if kind == "real" else zero)
    return float(np.clip(code, low, high)), abs(position - np.floor(position) - 0.5)


def optimal_brain_quantization(row, hessian, scales, zeros, *, order, bits, kind):
    """Codes of one row [k]: fix a weight, move all that are left to their optimum, and so on (2210.17323, Eq. 2).

    The inverse of what is left of the Hessian is computed anew every time. Returns the codes and the least distance from
    a tie.
    """
    weight, codes, tie = np.array(row, np.float64), np.zeros(len(row)), 0.5
    left = list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        j = left[0]
        codes[j], distance = nearest_code(weight[j], scales[j], zeros[j], bits=bits, kind=kind)
        tie = min(tie, distance)
        error = weight[j] - scales[j] * (codes[j] - zeros[j])
        weight[left] -= error / inverse[0, 0] * inverse[0]
        left = left[1:]
    return codes, tie


def refine_grid(row, scale, zero, *, bits, kind, iterations):
    """DVD-Quant's alternation for one row from a start. Returns scale, zero, codes and the error after each step."""
    low, high = limits(bits, kind)

    def codes_of(s, z):
        position = row / s
        return np.clip(np.rint(position + z) if kind == "real" else np.rint(position) + z, low, high)

    codes = codes_of(scale, zero)
    errors = [float(((scale * (codes - zero) - row) ** 2).sum())]
    for _ in range(iterations):
        steps = codes - zero
        new_scale = float(steps @ row / (steps @ steps))
        new_zero = zero
        if kind != "none":
            new_zero = float(np.clip(np.mean(codes - row / new_scale), low, high))
            new_zero = float(np.rint(new_zero)) if kind == "integer" else new_zero
        new_codes = codes_of(new_scale, new_zero)
        error = float(((new_scale * (new_codes - new_zero) - row) ** 2).sum())
        if error >= errors[-1]:
            break
        scale, zero, codes = new_scale, new_zero, new_codes
        errors.append(error)
    return scale, zero, codes, errors


def best_allocation(sensitivity, cost, budget):
    """All choices, one after the other: the least sum, then the least cost, then the lowest indices; None if none fits."""
    best = None
    for choice in itertools.product(range(len(sensitivity[0])), repeat=len(sensitivity)):
        total = sum(float(row[o]) for row, o in zip(sensitivity, choice, strict=True))
        spent = sum(float(row[o]) for row, o in zip(cost, choice, strict=True))
        if spent <= budget and (best is None or (total, spent, choice) < best):
            best = (total, spent, choice)
    return best
