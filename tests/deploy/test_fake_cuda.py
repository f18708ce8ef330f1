"""Passes of training and of packed models on fake CUDA tensors, which have shapes, types and a device, and no values.

FakeTensorMode refuses an operator over tensors of two devices, and whatever needs a value (which would wait for a GPU), so a
tensor that is left on the CPU shows here without a GPU. Torch for CPUs has no autograd for CUDA tensors: backward passes are
called by themselves. Packed layers run the operator's fake implementation with the weights that backends for GPUs prepare.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from qvgen.deploy.merged_linear import MergedPackedLinear
from qvgen.deploy.packed_fusion import fuse_packed_, prepack_, prepacked_layers
from qvgen.deploy.prepacked_copies import watch_copies_
from qvgen.layers import fake_quant_linear
from qvgen.layers.fake_quant_product import FakeQuantProduct
from qvgen.layers.packed_linear import PackedLinear
from qvgen.layers.swap import packed_layers
from qvgen_kernels import registry
from qvgen_kernels.triton import TritonBackend
from tests.deploy.test_packed_fusion import MODELS, call, make_fake, make_packed
from tests.layers.model import make_inputs, prepared_model
from tests.profiles import PROFILES, make_profile

CUDA = torch.device("cuda", 0)


def on_cuda(tensor: Tensor) -> Tensor:
    """An empty fake tensor like it; a FakeTensorMode is on."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def move_(model: nn.Module) -> None:
    """Put fake CUDA tensors into the places of a model's tensors and of the copies of its packed weights."""
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, value in slots.items():
                if value is not None:
                    slots[name] = on_cuda(value)
    for module in prepacked_layers(model):
        if isinstance(module, MergedPackedLinear):
            assert module._prepacked is not None
            name, spec, weight, bias = module._prepacked
            module._prepacked = name, spec, [*map(on_cuda, weight)], None if bias is None else on_cuda(bias)
            module._source = module._identity()
        else:
            module._prepacked = {
                widths: (name, spec, [*map(on_cuda, weight)])
                for widths, (name, spec, weight) in module._prepacked.items()
            }
    for layer in packed_layers(model).values():
        layer.settle_()


class WithoutGuard(TorchFunctionMode):
    """Indexing, ``copy_`` and ``contiguous`` by operators: Python's ask for a CUDA guard, which a CPU's torch lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            return torch.ops.aten.copy_.default(indexed(*args[:2]), args[2])
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        if func is torch.Tensor.contiguous and not kwargs:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def indexed(value: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if ... in parts:
        place = parts.index(...)
        missing = value.ndim - sum(part is not None for part in parts) + 1
        parts[place : place + 1] = [slice(None)] * missing
    dimension, tensors = 0, {}
    for part in parts:
        if part is None:
            value = value.unsqueeze(dimension)
        elif isinstance(part, int):
            value = value.select(dimension, part)
            continue
        elif isinstance(part, slice):
            value = torch.ops.aten.slice.Tensor(value, dimension, part.start, part.stop, part.step or 1)
        else:
            tensors[dimension] = part
        dimension += 1
    if not tensors:
        return value
    return torch.ops.aten.index.Tensor(value, [tensors.get(place) for place in range(max(tensors) + 1)])


@contextmanager
def fake_cuda(**options: bool) -> Iterator[None]:
    with FakeTensorMode(**options), WithoutGuard(), torch.no_grad():
        yield


def is_there(value: Tensor) -> bool:
    return isinstance(value, FakeTensor) and value.device == CUDA


class Context:
    """What autograd hands to both passes of a function."""

    needs_input_grad = (True,) * 10

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class BothPasses:
    """Stands in the place of a product: calls its forward and at once its backward pass, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def apply(self, *arguments: Any) -> Tensor:
        context = Context()
        y = FakeQuantProduct.forward(context, *arguments)
        gradients = FakeQuantProduct.backward(context, torch.empty_like(y))
        assert is_there(y)
        for given, gradient in zip(arguments, gradients, strict=True):
            if gradient is not None:
                assert is_there(gradient)
                assert gradient.shape == given.shape
        self.count += 1
        return y


@pytest.fixture
def both_passes(monkeypatch: pytest.MonkeyPatch) -> BothPasses:
    made = BothPasses()
    monkeypatch.setattr(fake_quant_linear, "FakeQuantProduct", made)
    return made


@pytest.mark.parametrize(("name", "phi_rank"), [*((name, 0) for name in PROFILES), ("paper", 4), ("svdq_g64", 4)])
def test_passes_of_fake_quantized_layers(name: str, phi_rank: int, both_passes: BothPasses) -> None:
    model = prepared_model(make_profile(name, weight_bits=4, activation_bits=4), phi_rank=phi_rank).train()
    inputs = make_inputs()
    with fake_cuda():
        move_(model)
        assert is_there(model(*map(on_cuda, inputs)))
    assert both_passes.count == 7


@pytest.mark.parametrize("name", MODELS)
def test_passes_of_a_fake_quantized_transformer(name: str, both_passes: BothPasses) -> None:
    model = make_fake(name).train()
    with fake_cuda():
        move_(model)
        assert is_there(call(name, model, device=CUDA))
    assert both_passes.count > 10


class OnAnyDevice(TritonBackend):
    """The backend ``triton`` without its question whether there is a card: weights are prepared by torch on any device."""

    name = "triton_anywhere"

    def refusal(self, spec: object, *, device: object) -> None:
        del spec, device


@pytest.mark.parametrize("kernel", ["triton_anywhere", "dequantize"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_transformer(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    registry.register_backend(OnAnyDevice())
    model = make_packed(name)
    for layer in packed_layers(model).values():
        layer.kernel = kernel
    fuse_packed_(model)
    assert prepack_(model) == {kernel}
    watch_copies_(model)
    with fake_cuda():
        move_(model)
        assert is_there(call(name, model, device=CUDA))
    assert all(isinstance(layer, PackedLinear) and not layer.visits for layer in packed_layers(model).values())


def test_a_tensor_that_is_left_on_the_cpu_is_refused() -> None:
    """These tests would see it."""
    model = prepared_model(make_profile("paper")).train()
    inputs = make_inputs()
    with fake_cuda(allow_non_fake_inputs=True):
        kept = model.blocks[0].up.activation_quantizer.clip_low
        move_(model)
        model.blocks[0].up.activation_quantizer.clip_low = kept
        with pytest.raises(RuntimeError, match=r"device"):
            model(*map(on_cuda, inputs))
