"""Finite or refused by name: against values put at known places, in every dtype, layout and size that a model has."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qvgen.errors import UserError
from qvgen.quant import finite
from qvgen.quant.finite import check_finite, is_finite

INFINITE = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", INFINITE, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for position in (0, 1, 16, 34):
        tensor = torch.linspace(-1, 1, 35)
        tensor[position] = value
        assert not is_finite(tensor.to(dtype).view(5, 7)), position
    assert is_finite(torch.linspace(-1, 1, 35).to(dtype).view(5, 7))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_every_byte_of_float8_is_judged_as_float32_judges_it(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    for byte in range(256):
        assert is_finite(every[byte]) == bool(every[byte].float().isfinite()), byte


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_and_smallest_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    assert is_finite(torch.tensor([limits.min, limits.max, limits.tiny, limits.smallest_normal, 0.0], dtype=dtype))


def test_large_tensors_are_read_to_the_last_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK", 10)
    tensor = torch.zeros(7, 5)
    for view in (tensor, tensor.T, tensor[:, ::2], tensor.expand(3, 7, 5), tensor[1:6, 1:4]):
        assert is_finite(view)
    for row, column in ((0, 0), (6, 4), (3, 2)):
        tensor[row, column] = math.nan
        assert not any(map(is_finite, (tensor, tensor.T, tensor[:, ::2], tensor.expand(3, 7, 5), tensor[:, None])))
        tensor[row, column] = 0.0


def test_what_holds_no_values_passes() -> None:
    with FakeTensorMode():
        fake = torch.full((2,), math.nan)
    meta = torch.full((2**40,), math.nan, device="meta")
    whole = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    for tensor in (fake, meta, whole, torch.zeros(0, 3), torch.tensor(True), torch.zeros(2, dtype=torch.uint8)):
        assert is_finite(tensor)


def test_complex_numbers_are_judged_by_both_parts() -> None:
    assert is_finite(torch.tensor([1 + 2j]))
    assert not is_finite(torch.tensor([complex(1, math.nan)]))
    assert not is_finite(torch.tensor([complex(math.inf, 1)]).conj())


def test_the_first_bad_tensor_is_named_with_its_counts_and_what_to_do() -> None:
    bad = torch.tensor([[math.nan, 1.0, math.inf], [-math.inf, math.nan, math.nan]])
    tensors = [("good", torch.ones(2)), ("blocks.0.bias", bad), ("later", bad)]
    with pytest.raises(UserError) as caught:
        check_finite(tensors, source="here/model.safetensors", remedy="copy the file again")
    message = str(caught.value)
    assert message.startswith("here/model.safetensors: 'blocks.0.bias', float32 [2, 3]")
    assert all(part in message for part in ("3 NaNs", "2 infinities", "6 values"))
    assert message.endswith("; copy the file again")
    with pytest.raises(ValueError, match=r"^x: 'y', float8_e5m2 \[\].* 1 infinity among 1 values$"):
        check_finite([("y", torch.tensor(math.inf, dtype=torch.float8_e5m2))], source="x")


def test_tensors_are_read_one_after_the_other() -> None:
    seen = []

    def tensors() -> object:
        for name in "abc":
            seen.append(name)
            yield name, torch.tensor([math.nan if name == "b" else 0.0])

    with pytest.raises(UserError, match="'b'"):
        check_finite(tensors(), source="a generator")  # type: ignore[arg-type]
    assert seen == ["a", "b"]
    check_finite([], source="nothing")
    check_finite(iter([("only", torch.ones(1))]), source="one")
