"""How many CPU threads compute, and that torch's mathematics on the CPU gives the same bits again.

The library of vector functions inside torch's CPU builds (Intel MKL's VML) prepares itself at its first call, and that is
not safe between threads: where two threads share the first sine of a process, now and then one of them computes its part with
errors of 1e-4 in place of 1e-7 (docs/log.md has the measurement). So that the same command gives the same bits, each function
is called once by one thread before anything is computed by several.

The library's products of small matrices have other last bits where a matrix lies elsewhere in memory, but on processors of
Intel with AVX-512: the same weights read from another file, or the same run again, then differ. MKL_CBWR=AUTO,STRICT ends
that, and costs no time (docs/log.md); the library reads it at its first call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

PRODUCTS = "MKL_CBWR"
"""The variable by which the library is told that its products shall have the same bits wherever matrices lie."""

VECTOR_FUNCTIONS = (
    "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log", "log10", "log1p", "log2",
    "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh",
)  # fmt: skip
"""What torch may compute with the library's vector functions, by its name in torch."""


def set_threads(number: int) -> None:
    """Let ``number`` threads of this process share torch's operations on the CPU from now on.

    Use it in place of ``torch.set_num_threads``, before anything is computed.

    Raises:
        ValueError: ``number`` is less than 1.
    """
    if number < 1:
        raise ValueError(f"{number} CPU threads; give 1 or more")
    prepare_mathematics()
    torch.set_num_threads(number)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside of the block: bits of what is made there don't depend on the environment."""
    before = torch.get_num_threads()
    set_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_products() -> None:
    """Tell the library of products to give the same bits wherever matrices lie, where the processor needs to be told.

    What the environment says already is kept. It is too late where this process has computed a product.
    """
    if torch.backends.mkl.is_available() and not _is_intel_with_avx512():
        os.environ.setdefault(PRODUCTS, "AUTO,STRICT")


@cache
def prepare_mathematics() -> None:
    """Settle products, and call each vector function and a product once on one thread; the number of threads stays."""
    settle_products()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.float64):
            values = torch.linspace(0.1, 0.9, 64, dtype=dtype)
            for name in VECTOR_FUNCTIONS:
                getattr(torch, name)(values)
            square = values.reshape(8, 8)
            torch.mm(square, square)
            torch.bmm(square[None], square[None])
    finally:
        torch.set_num_threads(before)


def _is_intel_with_avx512() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" in text and "avx512f" in text
