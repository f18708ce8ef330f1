"""Hadamard matrices in float64, from Paley (1933) and Sylvester; part of oracles.py. Imports nothing of qvgen."""

from __future__ import annotations

import numpy as np


def legendre(value, prime):
    """Quadratic character of a whole number modulo an odd prime, by Euler's criterion: -1, 0 or 1."""
    power = pow(value % prime, (prime - 1) // 2, prime)
    return -1 if power == prime - 1 else power


def paley_matrix(order):
    """Paley's Hadamard matrix (1933) over a prime field, int64 and symmetric, or None where he gives none of this order.

    Type I is the textbooks' bordered Q - I, Q[i,j] = legendre(i - j), q = 3 mod 4, with the columns of its core in the
    order 0, q - 1, ..., 1, which makes it symmetric; then residue 0 moves to the end of rows and columns.
    """
    for prime, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 or prime % 4 != residue or prime < 2 or any(prime % n == 0 for n in range(2, prime)):
            continue
        residues = np.arange(prime)
        characters = np.array([legendre(int(n), prime) for n in residues])
        core = characters[(residues[:, None] - residues[None, :]) % prime]
        if residue == 3:
            core = np.roll((core - np.eye(prime))[:, -residues % prime], -1, axis=(0, 1))
            return np.block([[np.ones((1, 1)), np.ones((1, prime))], [np.ones((prime, 1)), core]]).astype(np.int64)
        conference = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [np.ones((prime, 1)), core]])
        diagonal = np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])
        return (np.kron(conference, [[1, 1], [1, -1]]) + diagonal).astype(np.int64)
    return None


def hadamard_factors(block):
    """H_b (int64) of the smallest b with block = b 2^m, b = 1 or an order of Paley's, and m; None without one."""
    for m in range(block.bit_length(), -1, -1):
        if block % 2**m == 0:
            order = block // 2**m
            matrix = np.ones((1, 1), np.int64) if order == 1 else paley_matrix(order)
            if matrix is not None:
                return matrix, m
    return None


def rotate(rows, block):
    """Float64 rows [..., K] times the block-diagonal (H_b kron Sylvester) / sqrt(block), one factor after another."""
    matrix, m = hadamard_factors(block)
    rows = np.asarray(rows, np.float64)
    axes = rows.reshape(-1, len(matrix), *[2] * m)
    for axis, factor in enumerate((matrix, *[np.array([[1, 1], [1, -1]])] * m), start=1):
        axes = np.moveaxis(np.tensordot(axes, factor, (axis, 0)), -1, axis)
    return axes.reshape(rows.shape) / np.sqrt(block)


def hadamard_matrix(block):
    """H_b kron Sylvester's matrix, divided by sqrt(block)."""
    matrix, m = hadamard_factors(block)
    for _ in range(m):
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix / np.sqrt(block)


def regular_matrix(block):
    """Kronecker powers of the symmetric 4 x 4 matrix whose rows have the sum 2, divided by sqrt(block)."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron(matrix, 1 - 2 * np.fliplr(np.eye(4)))
    return matrix / np.sqrt(block)


def rotation_matrix(columns, block, kind="sylvester"):
    """Block-diagonal Hadamard [columns, columns]; the identity where ``block`` is 0."""
    if not block:
        return np.eye(columns)
    return np.kron(np.eye(columns // block), regular_matrix(block) if kind == "regular" else hadamard_matrix(block))
