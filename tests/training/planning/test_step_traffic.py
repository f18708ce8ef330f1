"""Kernels, products and bytes of operators, against what is known of them; and of a step of a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from qvgen.cli import main
from qvgen.training.planning.step_traffic import ModelledDevice, Traffic, TrafficOperators
from qvgen_kernels.fake_quantize import missing_reason
from tests.runs import shallow

DEVICE = ModelledDevice(
    name="D",
    flops={torch.float32: 1e12, torch.bfloat16: 4e12},
    bytes_per_second=1e12,
    product_share=0.5,
    attention_share=0.25,
    memory_share=0.8,
    kernel_seconds=1e-9,
)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = TrafficOperators(DEVICE, sees_fused=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.operators(func, args, kwargs or {})


def counted(function, *arguments: torch.Tensor) -> Traffic:  # type: ignore[no-untyped-def]
    with torch.no_grad(), Counting() as mode:
        function(*arguments)
    return mode.operators.traffic()


def test_elementwise_operators_read_and_write_their_tensors_once() -> None:
    x, row = torch.ones(1000, 100), torch.ones(100)
    assert counted(torch.add, x, x.clone()).other_bytes == 3 * 400_000
    assert counted(torch.mul, x, row).other_bytes == 2 * 400_000 + 400
    assert counted(torch.mul, x, row.expand(1000, 100)).other_bytes == 2 * 400_000 + 400
    assert counted(lambda: x.add_(1)).other_bytes == 2 * 400_000
    assert counted(lambda: x.to(torch.bfloat16)).other_bytes == 400_000 + 200_000
    assert counted(torch.sum, x).other_bytes == 400_000 + 4
    moved = counted(torch.add, x, x.clone())
    assert (moved.kernels, moved.product_flops, moved.product_ps) == (1, 0, 0)
    assert moved.other_ps == 1_500_000  # 1.2 MB at .8 TB/s


def test_views_and_allocations_are_no_kernels() -> None:
    x = torch.ones(1000, 100)
    for function in (lambda: x.t(), lambda: x.reshape(10, -1)[2:], lambda: torch.empty(5), lambda: torch.empty_like(x)):
        assert counted(function) == Traffic(**dict.fromkeys(Traffic.__dataclass_fields__, 0))


@pytest.mark.parametrize(("dtype", "speed"), [(torch.float32, 0.5e12), (torch.bfloat16, 2e12)])
def test_a_product_takes_its_operations_or_its_bytes(dtype: torch.dtype, speed: float) -> None:
    wide = counted(torch.mm, torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
    assert wide.product_flops == 2 * 512**3
    assert wide.product_ps == round(1e12 * 2 * 512**3 / speed)
    thin = counted(torch.mm, torch.ones(512, 1, dtype=dtype), torch.ones(1, 512, dtype=dtype))
    assert thin.product_ps == round(1e12 * (512 * 512 + 2 * 512) * dtype.itemsize / 0.8e12)
    assert wide.other_bytes == thin.other_bytes == 0


def test_attention_is_a_product_of_its_own() -> None:
    q = torch.ones(1, 2, 128, 64)
    found = counted(functional.scaled_dot_product_attention, q, q, q)
    assert found.attention_flops == 2 * 2 * 2 * 128 * 128 * 64
    assert found.attention_ps == round(1e12 * found.attention_flops / 0.25e12)
    assert found.product_flops == 0


def test_a_fused_operator_is_one_kernel() -> None:
    assert missing_reason("cpu") is None
    x, params = torch.ones(64, 32), [torch.ones(64, 1), torch.zeros(64, 1)]
    spec = '{"kind": "static", "qmin": 0, "qmax": 15, "zero_point": "integer", "group": 32}'
    found = counted(lambda: torch.ops.qvgen.quantize_rows(x, params, None, spec, torch.bfloat16))
    assert found.kernels == 1
    assert found.other_bytes == 64 * 32 * (4 + 2) + 3 * 64 * 4


FEW = "model.include=['*.attn1.to_q','*.attn1.to_k','*.ffn.net.2']"
"""Layers that share an input and one that does not: the more layers, the more operators are counted."""


def test_a_step_of_a_model(tmp_path: Path) -> None:
    keys = ["model=tiny", "widths=[4,3]", f"out={tmp_path}", "logger=csv", FEW, *shallow(3)]
    assert main(["benchmark", "step_traffic", *keys]) == 0
    rows = json.loads((tmp_path / "step-traffic-tiny.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == ["4", "3"]
    for row in rows:
        kernels = {name: own["kernels"] for name, own in row["traffic"].items()}
        assert kernels["plain"] < kernels["quantized"] < kernels["with Phi"] < kernels["unfused"]
        moved = {name: own["other_bytes"] for name, own in row["traffic"].items()}
        assert moved["plain"] < moved["quantized"] < moved["with Phi"] < moved["unfused"]
        attention = {own["attention_flops"] for own in row["traffic"].values()}
        assert len(attention) == 1
        assert row["ratios"]["plain"] == 1
        assert row["ratios"]["unfused"] > row["ratios"]["quantized"] > 1
    assert "predicted, not measured" in (tmp_path / "step-traffic-tiny.md").read_text().splitlines()[0]
