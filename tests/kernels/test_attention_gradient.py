"""Gradient of the quantized attention against the derivative of a smooth float64 function and that of exact attention."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention, attention_kernels
from qvgen_kernels.attention.contract import AttentionKind
from tests.kernels.attention_gradient_oracle import Surrogate, gradients

KERNELS = [name for name, reason in attention_kernels(torch.device("cpu")).items() if reason is None]
ROUNDING = 3e-5
"""Bound of a gradient's relative error by float32 sums of up to 700 terms that cancel; measured: up to 1.1e-5."""


def numbers(shape: tuple[int, ...], *, size: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values with common offsets, and a gradient of the outputs."""
    batch, heads, queries, keys, head_size = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, head_size, generator=generator)

    tensors = [draw(queries) * size, draw(keys) + 2 * draw(1), draw(keys) + draw(1), draw(queries)]
    return [tensor.to(dtype) for tensor in tensors]


def backward(tensors, *, spec, mask=None, clips=(None, None), kernel="auto"):
    """Outputs and gradients of q, k, v and of those clips that there are."""
    *inputs, grad = tensors
    leaves = [
        tensor.detach().clone().requires_grad_() for tensor in (*inputs, *(clip for clip in clips if clip is not None))
    ]
    rest = iter(leaves[3:])
    learned = AttentionTensors(*(None if clip is None else next(rest) for clip in clips))
    y = attention(*leaves[:3], spec=spec, mask=mask, tensors=learned, kernel=kernel)
    y.backward(grad)
    return y.detach(), [leaf.grad for leaf in leaves]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def as_spec(spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    kind = spec.probability_type(dtype)
    plain = None if kind is None else str(kind).removeprefix("torch.")
    return {"factor": spec.score_factor, "smooth_key": spec.smooth_key, "rotation": spec.rotation, "plain": plain}


def test_the_oracle_is_a_derivative() -> None:
    """Central differences of the smooth function in three directions of each input."""
    q, k, v, grad = (tensor[0, 0].numpy() for tensor in numbers((1, 1, 3, 70, 4), size=2.0))
    draw = np.random.default_rng(0)
    keywords = {"seen": draw.random((3, 70)) > 0.2, "spec": as_spec(AttentionSpec(4, rotation=4)), "clips": (0.8, 0.9)}
    surrogate = Surrogate((q, k, v), **keywords)
    point = [torch.tensor(part, dtype=torch.float64) for part in (q, k, v, 0.8, 0.9)]
    _, found = gradients((q, k, v), grad, **keywords)
    weight, step = torch.tensor(grad, dtype=torch.float64), 1e-6
    for number, part in enumerate(point):
        for _ in range(3):
            direction = torch.tensor(draw.standard_normal(part.shape))
            ends = [
                (surrogate(*point[:number], part + sign * step * direction, *point[number + 1 :]) * weight).sum()
                for sign in (1, -1)
            ]
            slope = (found[number] * direction).sum()
            assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 1e-7 * found[number].norm() * direction.norm()


@pytest.mark.parametrize(
    ("changed", "size"),
    [
        ({}, 1.0),
        ({"smooth_key": False}, 3.0),
        ({"rotation": 12}, 0.2),
        ({"softmax_scale": 1.5}, 10.0),
        ({"kind": "int8_qk"}, 1.0),
    ],
    ids=["default", "not smooth", "rotated", "peaky", "scores alone"],
)
def test_gradients_are_those_of_the_oracle(changed: dict[str, object], size: float) -> None:
    """With clips that cut, a mask of each query and one query that sees nothing."""
    tensors, spec = numbers((2, 2, 6, 150, 12), size=size), AttentionSpec(12, **changed)
    seen = torch.rand(1, 2, 6, 150, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[..., 2, :] = False
    clips = torch.tensor([0.7, 1.0]), torch.tensor([1.0, 0.8])
    results = [backward(tensors, spec=spec, mask=seen, clips=clips, kernel=kernel) for kernel in KERNELS]
    wanted = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in (*tensors[:3], *clips)]
    for sample in range(2):
        for head in range(2):
            *point, grad = (tensor[sample, head].numpy() for tensor in tensors)
            pair = tuple(clip[head].item() for clip in clips)
            output, parts = gradients(point, grad, clips=pair, seen=seen[0, head].numpy(), spec=as_spec(spec))
            assert distance(results[0][0][sample, head], output) < ROUNDING
            for total, part in zip(wanted[:3], parts[:3], strict=True):
                total[sample, head] = part
            for total, part in zip(wanted[3:], parts[3:], strict=True):
                total[head] += part
    for _, found in results:
        for tensor, total in zip(found, wanted, strict=True):
            assert distance(tensor, total) < ROUNDING
        assert not found[0][:, :, 2].any()
    compiled = [found for name, (_, found) in zip(KERNELS, results, strict=True) if name != "reference"]
    for found in compiled[1:]:
        assert all(map(torch.equal, found, compiled[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 1, 530, 65, 64), "int8"),
        ((1, 2, 129, 300, 72), "int8"),
        ((1, 2, 33, 1, 96), "int8"),
        ((1, 1, 64, 700, 128), "int8"),
        ((1, 1, 66, 130, 64), "int8_qk"),
    ],
    ids=str,
)
def test_shapes_and_types(dtype: torch.dtype, shape: tuple[int, ...], kind: AttentionKind) -> None:
    """Half precision: the gradient of the rounded inputs in float32, rounded once, to half a unit in its last place."""
    tensors, spec = numbers(shape, dtype=dtype), AttentionSpec(shape[4], kind=kind)
    results = [backward(tensors, spec=spec, kernel=kernel)[1] for kernel in KERNELS]
    seen = np.ones((shape[2], shape[3]), dtype=bool)
    for head in range(shape[1]):
        *point, grad = (tensor[0, head].float().numpy() for tensor in tensors)
        _, wanted = gradients(point, grad, seen=seen, spec=as_spec(spec, dtype))
        for tensor, part in ((found[number], wanted[number]) for found in results for number in range(3)):
            assert tensor.dtype is dtype
            if shape[3] == 1 and part is not wanted[2]:
                assert tensor[0, head].abs().max() < 1e-5  # one key: nothing moves its weight
            else:
                assert distance(tensor[0, head], part) < ROUNDING + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("size", "bound"), [(0.2, 0.012), (1.0, 0.02), (3.0, 0.03)])
def test_distance_to_the_gradient_of_exact_attention(size: float, bound: float) -> None:
    tensors = numbers((1, 2, 96, 1024, 64), size=size)
    _, found = backward(tensors, spec=AttentionSpec(64))
    exact = [tensor.double().requires_grad_() for tensor in tensors[:3]]
    scaled_dot_product_attention(*exact).backward(tensors[3].double())
    for tensor, leaf in zip(found, exact, strict=True):
        assert distance(tensor, leaf.grad) < bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("clips", [(None, 0.9), (0.9, None)], ids=["key", "query"])
def test_one_clip_alone(kernel: str, clips: tuple[float | None, ...]) -> None:
    tensors, spec = numbers((1, 2, 5, 70, 8)), AttentionSpec(8)
    one = tuple(None if clip is None else torch.full((2,), clip) for clip in clips)
    both = tuple(torch.full((2,), clip or 1.0) for clip in clips)
    y, found = backward(tensors, spec=spec, clips=one, kernel=kernel)
    wanted, parts = backward(tensors, spec=spec, clips=both, kernel=kernel)
    assert torch.equal(y, wanted)
    assert torch.equal(found[3], parts[3 if clips[0] else 4])
    for tensor, part in zip(found[:3], parts[:3], strict=True):
        assert torch.equal(tensor, part)


@pytest.mark.parametrize("kernel", KERNELS)
def test_masks_that_are_shared_are_the_same_mask(kernel: str) -> None:
    tensors, spec = numbers((2, 2, 5, 70, 8)), AttentionSpec(8)
    full = torch.rand(2, 2, 5, 70, generator=torch.Generator().manual_seed(2)) > 0.5
    for part in (full[:1], full[:, :1], full[:, :, :1], full[..., :1]):
        _, found = backward(tensors, spec=spec, mask=part, kernel=kernel)
        _, wanted = backward(tensors, spec=spec, mask=part.expand(2, 2, 5, 70).contiguous(), kernel=kernel)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_what_is_not_finite_stays_in_its_head(kernel: str, kind: AttentionKind) -> None:
    tensors, spec = numbers((1, 2, 9, 70, 64)), AttentionSpec(64, kind=kind)
    clips = torch.ones(2), torch.ones(2)
    _, clean = backward(tensors, spec=spec, clips=clips, kernel=kernel)
    for place, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        damaged = [tensor.clone() for tensor in tensors]
        damaged[place][0, 1, 3, 5] = number
        _, found = backward(damaged, spec=spec, clips=clips, kernel=kernel)
        for tensor, untouched in zip(found, clean, strict=True):
            of_first = tensor[0] if tensor.ndim == 1 else tensor[:, 0]
            assert torch.equal(of_first, untouched[0] if tensor.ndim == 1 else untouched[:, 0])
        assert all(tensor[0, 1].isnan().all() for tensor in found[1:3])
        assert all(clip[1].isnan() for clip in found[3:])
        rows = found[0][0, 1].isnan()
        if place == 0:  # a query damages no other query
            assert rows[3].all()
            assert torch.equal(found[0][0, 1, :3], clean[0][0, 1, :3])
        else:
            assert rows.all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_runs_and_two_threads_have_the_same_bits(kernel: str) -> None:
    tensors, spec = numbers((1, 2, 600, 300, 64)), AttentionSpec(64)
    clips = torch.full((2,), 0.9), torch.full((2,), 0.8)
    _, wanted = backward(tensors, spec=spec, clips=clips, kernel=kernel)
    before = torch.get_num_threads()
    for threads in (1, 2):
        try:
            torch.set_num_threads(threads)
            _, found = backward(tensors, spec=spec, clips=clips, kernel=kernel)
        finally:
            torch.set_num_threads(before)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_change_no_bit(kernel: str) -> None:
    tensors, spec = numbers((2, 3, 70, 65, 64)), AttentionSpec(64)
    _, wanted = backward(tensors, spec=spec, kernel=kernel)
    leaves = [tensor.transpose(1, 2).contiguous().requires_grad_() for tensor in tensors[:3]]
    y = attention(*(leaf.transpose(1, 2) for leaf in leaves), spec=spec, kernel=kernel)
    y.transpose(1, 2).backward(tensors[3].transpose(1, 2).contiguous())
    assert all(torch.equal(leaf.grad.transpose(1, 2), part) for leaf, part in zip(leaves, wanted, strict=True))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_nothing_of_queries_times_keys_is_made_or_kept(kernel: str, kind: AttentionKind) -> None:
    tokens, spec = 1024, AttentionSpec(4, kind=kind)
    *inputs, grad = numbers((1, 1, tokens, tokens, 4))
    leaves, kept = [tensor.requires_grad_() for tensor in inputs], []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = attention(*leaves, spec=spec, kernel=kernel)
        y.backward(grad)
    assert {tensor.data_ptr() for tensor in kept} == {
        leaf.data_ptr() for leaf in leaves
    }  # the inputs, and nothing else
    assert largest.elements <= 512 * 64 + 512 * 4  # one block of queries and keys; all scores are 32 times as many


def test_compiled_whole() -> None:
    *inputs, grad = numbers((1, 2, 9, 70, 64))
    spec, seen = AttentionSpec(64), torch.ones(1, 1, 1, 70, dtype=torch.bool)

    def model(q, k, v, clip):
        clips = AttentionTensors(query_clip=clip.sigmoid())
        return attention(q * 2, k, v, spec=spec, mask=seen, tensors=clips) * 3

    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for function in (model, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, torch.ones(2))]
        function(*leaves).backward(grad)
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


def test_checkpointing_computes_the_same_again() -> None:
    *inputs, grad = numbers((1, 2, 9, 70, 64))
    results = []
    for repeat in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]

        def block(q, k, v):
            return attention(q * 2, k, v, spec=AttentionSpec(64)).tanh()

        y = checkpoint(block, *leaves, use_reentrant=False) if repeat else block(*leaves)
        y.backward(grad)
        results.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_no_bit(kernel: str) -> None:
    tensors, spec = numbers((1, 2, 9, 70, 64)), AttentionSpec(64)
    y, wanted = backward(tensors, spec=spec, kernel=kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, parts = backward(tensors, spec=spec, kernel=kernel)
    assert torch.equal(found, y)
    assert all(map(torch.equal, parts, wanted))


def test_the_operators_are_what_torch_expects() -> None:
    *inputs, _ = numbers((1, 2, 3, 5, 8))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    for clips in ([], [torch.full((2,), 0.9, requires_grad=True) for _ in range(2)]):
        torch.library.opcheck(
            torch.ops.qvgen.attention.default, (*leaves, None, clips, AttentionSpec(8).to_string(), "reference")
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_attend(kernel: str) -> None:
    for shape in ((1, 2, 3, 0, 8), (1, 2, 0, 3, 8)):
        tensors = numbers((1, 2, 3, 3, 8))
        tensors = [tensor[:, :, : shape[place]] for tensor, place in zip(tensors, (2, 3, 3, 2), strict=True)]
        _, found = backward(tensors, spec=AttentionSpec(8), clips=(torch.ones(2), torch.ones(2)), kernel=kernel)
        assert [tensor.shape for tensor in found[:3]] == [tensor.shape for tensor in tensors[:3]]
        assert not any(tensor.any() for tensor in found)


def test_a_gradient_of_another_shape_is_refused() -> None:
    q, k, v, grad = numbers((1, 2, 3, 5, 8))
    with pytest.raises(ValueError, match=r"grad is \[1, 2, 2, 8\] on cpu; it must be \[1, 2, 3, 8\]"):
        torch.ops.qvgen.attention_backward(grad[:, :, :2], q, k, v, None, [], AttentionSpec(8).to_string(), "auto")


def test_second_derivatives_are_refused() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in numbers((1, 1, 2, 3, 4))[:3])
    (grad,) = torch.autograd.grad(attention(q, k, v, spec=AttentionSpec(4)).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
