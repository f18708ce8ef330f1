"""Singular value decompositions that never touch a dense matrix twice.

``truncated_svd`` starts Phi: the best rank-r approximation of a residual W - Q(W) [N, K] (Eckart-Young), by a
randomized range finder with power iterations (Halko, Martinsson, Tropp 2011, Alg. 4.4 and 5.1).
``refactor`` halves it: the SVD of a product L R of rank r needs two thin QR decompositions and one r x r SVD, so
its cost is (N + K) r^2 instead of N K min(N, K).

Both split the singular values evenly, L = U sqrt(S) and R = sqrt(S) V^T, work in float64 (the factors are thin) and
fix the signs (the largest entry of each column of L is positive), so that every process computes the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qvgen.quant.precision import to_float64

OVERSAMPLING = 16
POWER_ITERATIONS = 4


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype).squeeze(0)
    root = s.sqrt()
    return u * (sign * root), (sign * root).unsqueeze(-1) * vh


def truncated_svd(matrix: Tensor, *, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors of a matrix, by randomized SVD.

    Args:
        matrix: [N, K], any float dtype.
        rank: 1 to min(N, K).
        generator: Source of the Gaussian test matrix, on the CPU: the same draw on every device.

    Returns:
        L [N, rank] and R [rank, K], float32, columns in falling order of singular value. The squared error is
        within 1 % of the optimal one for the flat spectra of rounding residuals; exact where rank + 16 reaches
        min(N, K).

    Raises:
        ValueError: ``rank`` outside 1..min(N, K).
    """
    smaller = min(matrix.shape)
    if not 1 <= rank <= smaller:
        raise ValueError(f"rank={rank} is outside 1..{smaller} for a weight of shape {list(matrix.shape)}")
    a = to_float64(matrix)
    width = rank + OVERSAMPLING
    if width >= smaller:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
    else:
        test = torch.randn(a.shape[1], width, generator=generator, dtype=torch.float64).to(a.device)
        basis = torch.linalg.qr(a @ test).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.mT @ a, full_matrices=False)
        u = basis @ u
    left, right = _balanced(u[:, :rank], s[:rank], vh[:rank])
    return left.float().to(matrix.device), right.float().to(matrix.device)


def refactor(left: Tensor, right: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Sorted singular factors of the product ``left @ right``, truncated to ``rank``.

    The product is unchanged (relative error about 1e-7, the cast to float32) as long as its rank is at most
    ``rank``.

    Args:
        left: [N, r].
        right: [r, K].
        rank: 1 to r.

    Returns:
        L [N, rank], R [rank, K], float32.
    """
    if not 1 <= rank <= left.shape[1]:
        raise ValueError(f"rank={rank} is outside 1..{left.shape[1]}, the rank of the factors")
    q_left, t_left = torch.linalg.qr(to_float64(left))
    q_right, t_right = torch.linalg.qr(to_float64(right).mT)
    u, s, vh = torch.linalg.svd(t_left @ t_right.mT, full_matrices=False)
    new_left, new_right = _balanced(q_left @ u[:, :rank], s[:rank], vh[:rank] @ q_right.mT)
    return new_left.float().to(left.device), new_right.float().to(left.device)


def random_factors(left: Tensor, right: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian factors whose product has the Frobenius norm of ``left @ right``, split and sorted as all factors are.

    Args:
        left: float32 [N, r].
        right: float32 [r, K].
        generator: On the CPU: the same draw on every device.

    Returns:
        L [N, r], R [r, K], float32.
    """
    drawn = [torch.randn(factor.shape, generator=generator).to(factor.device) for factor in (left, right)]
    new_left, new_right = refactor(drawn[0], drawn[1], rank=left.shape[1])
    # Of a product L R the squared norm is the sum over both Gram matrices, entry by entry.
    old, new = (
        float((to_float64(a.mT) @ to_float64(a)).mul(to_float64(b) @ to_float64(b.mT)).sum().clamp(min=0).sqrt())
        for a, b in ((left, right), (new_left, new_right))
    )
    factor = math.sqrt(old / new)
    return new_left * factor, new_right * factor
