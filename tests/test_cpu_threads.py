"""How many threads compute; on which of them torch's functions are called first: tests/test_new_process.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qvgen.cpu_threads import PRODUCTS, one_thread, set_threads, settle_products


def test_the_number_of_threads_is_what_was_asked_for_and_comes_back() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="0 CPU threads; give 1 or more"):
        set_threads(0)


PLACES = """
import torch
from qvgen.cpu_threads import one_thread

def placed(x, offset):
    memory = torch.empty(x.numel() + 32)
    first = -(memory.data_ptr() // 4) % 16 + offset
    return memory[first : first + x.numel()].view(x.shape).copy_(x)

with one_thread():
    generator = torch.Generator().manual_seed(0)
    for rows, columns, outputs in ((1, 32, 32), (2, 32, 64), (7, 100, 30), (64, 64, 64)):
        x, w = torch.randn(rows, columns, generator=generator), torch.randn(outputs, columns, generator=generator)
        products = [torch.nn.functional.linear(placed(x, n), placed(w, m)) for n in range(16) for m in (0, n, 5)]
        print(rows, all(torch.equal(product, products[0]) for product in products))
"""


def test_products_of_matrices_have_the_same_bits_wherever_these_lie_in_memory() -> None:
    """In a process of its own: the library reads what it is told at its first product."""
    settle_products()
    if PRODUCTS not in os.environ:
        pytest.skip("products are left as they are on this processor")
    environment = {name: value for name, value in os.environ.items() if name != PRODUCTS}
    done = subprocess.run(
        [sys.executable, "-c", PLACES], env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1 True", "2 True", "7 True", "64 True"]


def test_the_environment_s_word_on_products_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRODUCTS, "COMPATIBLE")
    settle_products()
    assert os.environ[PRODUCTS] == "COMPATIBLE"
