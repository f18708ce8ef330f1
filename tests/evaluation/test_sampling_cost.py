"""Memory and seconds of sampling, against allocations of known size."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from qvgen.evaluation.sampling_cost import measured, memory_source, weight_bytes, weights_dtype

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self tells of memory on Linux alone")
@pytest.mark.parametrize("mib", [64, 128])
def test_the_peak_is_what_was_taken_inside_and_freed_again(mib: int) -> None:
    held = torch.ones(32 * MIB)  # 128 MiB that lie there before are not counted
    with measured(CPU) as spent:
        torch.ones(mib * MIB // 4).sum()
    assert spent.working_bytes is not None
    # Linux keeps part of the count per thread (a few hundred kB less); what else the process does meanwhile is a few MiB.
    assert (mib - 2) * MIB <= spent.working_bytes < (mib + 24) * MIB
    assert spent.seconds > 0
    assert "resident" in memory_source(CPU)
    assert held.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self tells of memory on Linux alone")
def test_an_earlier_peak_does_not_count() -> None:
    torch.ones(64 * MIB).sum()  # 256 MiB, freed
    with measured(CPU) as spent:
        torch.ones(MIB).sum()
    assert spent.working_bytes is not None
    assert spent.working_bytes < 64 * MIB


def test_weights_are_all_tensors_of_the_modules_and_each_storage_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 400
    model[0].register_buffer("scale", torch.ones(5))
    model[0].copies = {"vnni": (torch.zeros(7, dtype=torch.uint8), [torch.zeros(3)])}  # as kernels keep theirs
    assert weight_bytes(model) == 400 + 20 + 7 + 12
    assert weights_dtype(model.to(torch.bfloat16)) == "bfloat16"
