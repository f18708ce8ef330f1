"""Quantized attention: every kernel that runs here against an oracle of its own and against exact attention in float64."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention, attention_kernels, resolve_attention
from qvgen_kernels.attention.contract import AttentionKind
from qvgen_kernels.attention.reference import fused
from qvgen_kernels.errors import KernelUnavailableError
from tests.kernels.attention_oracle import attend

CPU = torch.device("cpu")
KERNELS = [name for name, reason in attention_kernels(CPU).items() if reason is None]
SHAPES = [
    (1, 1, 5, 7, 64),
    (2, 3, 70, 65, 64),
    (1, 2, 129, 300, 72),
    (1, 2, 33, 1, 96),
    (1, 1, 64, 700, 128),
    (1, 1, 3, 64, 4),
]


def numbers(shape: tuple[int, ...], *, size: float = 1.0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys with a common offset, and values."""
    batch, heads, queries, keys, head_size = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    q = torch.randn(batch, heads, queries, head_size, generator=generator) * size
    k = torch.randn(batch, heads, keys, head_size, generator=generator)
    k += 2 * torch.randn(batch, heads, 1, head_size, generator=generator)
    v = torch.randn(batch, heads, keys, head_size, generator=generator)
    return [tensor.to(dtype) for tensor in (q, k, v)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("changed", "size"),
    [({}, 1.0), ({"smooth_key": False}, 6.0), ({"rotation": 12}, 0.2), ({"softmax_scale": 1.5}, 40.0)],
    ids=["default", "not smooth", "rotated", "peaky"],
)
def test_outputs_are_those_of_the_oracle(kernel: str, changed: dict[str, object], size: float) -> None:
    q, k, v = numbers((1, 2, 6, 150, 12), size=size)
    spec = AttentionSpec(12, **changed)
    seen = torch.rand(1, 1, 6, 150, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[..., 2, :] = False
    clips = AttentionTensors(query_clip=torch.tensor([0.7, 1.0]), key_clip=torch.tensor([1.0, 0.8]))
    found = attention(q, k, v, spec=spec, mask=seen, tensors=clips, kernel=kernel)
    for head in range(2):
        wanted = attend(
            *(tensor[0, head].numpy() for tensor in (q, k, v)),
            seen=seen[0, 0].numpy(),
            factor=spec.score_factor,
            smooth_key=spec.smooth_key,
            rotation=spec.rotation,
            query_clip=clips.query_clip[head].item(),
            key_clip=clips.key_clip[head].item(),
        )
        assert np.array_equal(found[0, head].numpy(), wanted)
    assert not found[:, :, 2].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_in_8_bits_alone_are_those_of_the_oracle(kernel: str, dtype: torch.dtype) -> None:
    """Probabilities and values of the inputs' type, and float32 sums in the order of keys."""
    q, k, v = numbers((1, 2, 6, 150, 12), size=2.0, dtype=dtype)
    spec = AttentionSpec(12, rotation=12, kind="int8_qk")
    seen = torch.rand(1, 1, 6, 150, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[..., 2, :], seen[..., 4, :64] = False, False
    clips = AttentionTensors(query_clip=torch.tensor([0.7, 1.0]), key_clip=torch.tensor([1.0, 0.8]))
    found = attention(q, k, v, spec=spec, mask=seen, tensors=clips, kernel=kernel)
    assert found.dtype is dtype
    for head in range(2):
        wanted = attend(
            *(tensor[0, head].float().numpy() for tensor in (q, k, v)),
            seen=seen[0, 0].numpy(),
            factor=spec.score_factor,
            smooth_key=True,
            rotation=12,
            query_clip=clips.query_clip[head].item(),
            key_clip=clips.key_clip[head].item(),
            plain=str(dtype).removeprefix("torch."),
        )
        assert torch.equal(found[0, head], torch.tensor(wanted).to(dtype))
    assert not found[:, :, 2].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rise", [1.0, 60.0, 400.0])
def test_keys_that_outweigh_all_before(kernel: str, rise: float) -> None:
    """Sums shrink by up to 2^-64 at a time, below the smallest float32 in all: they are dropped at a stated size."""
    q, k, v = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 320, 4), numbers((1, 1, 2, 320, 4))[2]
    k += rise * torch.arange(5).repeat_interleave(64).view(1, 1, 320, 1)
    spec = AttentionSpec(4, smooth_key=False, softmax_scale=0.2)
    seen = np.ones((2, 320), dtype=bool)
    wanted = attend(
        *(tensor[0, 0].numpy() for tensor in (q, k, v)),
        seen=seen,
        factor=spec.score_factor,
        smooth_key=False,
        rotation=0,
    )
    assert np.array_equal(attention(q, k, v, spec=spec, kernel=kernel)[0, 0].numpy(), wanted)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_have_the_reference_s_bits(kernel: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = numbers(shape, size=3.0, dtype=dtype)
    hidden = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(1)) > 0.3
    plain = AttentionSpec(shape[4], kind="int8_qk")
    for mask, spec in ((None, AttentionSpec(shape[4])), (hidden, AttentionSpec(shape[4])), (hidden, plain)):
        wanted = attention(q, k, v, spec=spec, mask=mask, kernel="reference")
        assert torch.equal(attention(q, k, v, spec=spec, mask=mask, kernel=kernel), wanted)


@pytest.mark.parametrize("size", [0.2, 1.0, 3.0])
def test_distance_to_exact_attention(size: float) -> None:
    q, k, v = numbers((1, 2, 96, 2048, 64), size=size)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())

    def error(kind: AttentionKind) -> float:
        return ((attention(q, k, v, spec=AttentionSpec(64, kind=kind)) - exact).norm() / exact.norm()).item()

    assert error("int8") < {0.2: 0.012, 1.0: 0.02, 3.0: 0.03}[size]
    assert error("int8_qk") < min({0.2: 0.004, 1.0: 0.013, 3.0: 0.023}[size], error("int8"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_rows_that_are_not_finite(kernel: str, kind: AttentionKind) -> None:
    q, k, v = numbers((1, 2, 9, 70, 64))
    spec = AttentionSpec(64, kind=kind)
    clean = attention(q, k, v, spec=spec, kernel=kernel)
    q[0, 0, 3, 5] = torch.nan
    q[0, 1, 8, 0] = torch.inf
    found = attention(q, k, v, spec=spec, kernel=kernel)
    assert found[0, 0, 3].isnan().all()
    assert found[0, 1, 8].isnan().all()
    is_touched = found.isnan().any(-1)
    assert is_touched.sum() == 2
    assert torch.equal(found[~is_touched], clean[~is_touched])
    q = q.nan_to_num(0.0, posinf=0.0)
    for tensor in (k, v):
        before = tensor[0, 1, 69, 2].item()
        tensor[0, 1, 69, 2] = torch.inf
        found = attention(q, k, v, spec=spec, kernel=kernel)
        assert found[0, 1].isnan().all()
        assert found[0, 0].isfinite().all()
        tensor[0, 1, 69, 2] = before


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_too_large_for_float32(kernel: str) -> None:
    """A query is no steeper than one power of two for one unit of its head's scores: equal keys have equal weights."""
    q, k, v = (torch.full((1, 1, 2, 4), value) for value in (1e30, 1e30, 1.0))
    v[:, :, 1] = 3.0
    spec = AttentionSpec(4, smooth_key=False)
    for sign in (1, -1):
        assert torch.equal(attention(sign * q, k, v, spec=spec, kernel=kernel), torch.full((1, 1, 2, 4), 2.0))
    k[:, :, 1] *= 0.9
    assert torch.equal(attention(q, k, v, spec=spec, kernel=kernel), torch.full((1, 1, 2, 4), 1.0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("largest", [1e33, 3e38])
def test_keys_too_large_for_float32(kernel: str, largest: float) -> None:
    q, k, v = numbers((1, 2, 3, 5, 8))
    k[0, 1, 2, 3] = largest
    found = attention(q, k, v, spec=AttentionSpec(8, smooth_key=False), kernel=kernel)
    assert found[0, 1].isnan().all()
    assert found[0, 0].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-32, 3.0, 1e3, 1e6, 1e12])
def test_scores_of_any_size_are_those_of_the_oracle(kernel: str, scale: float) -> None:
    """Up to and beyond the steepest factor: no code leaves 8 bits, and the largest key of a block keeps one."""
    q, k, v = numbers((1, 1, 4, 130, 8))
    spec = AttentionSpec(8, softmax_scale=scale)
    found = attention(q, k, v, spec=spec, kernel=kernel)
    inputs = (tensor[0, 0].numpy() for tensor in (q, k, v))
    seen = np.ones((4, 130), dtype=bool)
    assert np.array_equal(
        found[0, 0].numpy(), attend(*inputs, seen=seen, factor=spec.score_factor, smooth_key=True, rotation=0)
    )


def test_a_sum_of_a_product_is_rounded_once() -> None:
    """Numbers whose float64 sum is a half of float32's last place, and the exact one is not; and random ones."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 20000, generator=generator) * 2.0 ** torch.randint(
        -20, 20, (3, 20000), generator=generator
    )
    a[:3], b[:3] = 1 + 2.0**-12, torch.tensor([1 + 2.0**-12, 1 - 2.0**-12, 2.0**-60])
    c[:3] = torch.tensor([2.0**-80, 2.0**24 + 2, 1 + 2.0**-23])
    a[3], b[3], c[3] = 1 + 2.0**-23, 2.0**-24, 1.0  # above a half by 2^-47
    a[4], b[4], c[4] = 2.0**-24 * (1 - 2.0**-24), 1.0, 1.0  # below one
    a[5], b[5], c[5] = 2.0**-24, 1 + 2.0**-23, 2.0**30  # far below
    found = fused(a, b, c)
    for one, wanted in zip(found.tolist(), map(_once, a.tolist(), b.tolist(), c.tolist()), strict=True):
        assert one == wanted


def _once(a: float, b: float, c: float) -> float:
    """The float32 number next to a b + c, by fractions."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = np.float32(float(exact))  # at most one beside it
    around = [np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)] + [near]
    least = min(abs(Fraction(float(number)) - exact) for number in around)
    closest = [number for number in around if abs(Fraction(float(number)) - exact) == least]
    return float(next(number for number in closest if len(closest) == 1 or number.view(np.int32) % 2 == 0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", get_args(AttentionKind))
def test_strides_and_threads_change_no_bit(kernel: str, kind: AttentionKind) -> None:
    q, k, v = numbers((2, 3, 130, 65, 64))
    spec = AttentionSpec(64, kind=kind)
    wanted = attention(q, k, v, spec=spec, kernel=kernel)
    moved = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attention(*moved, spec=spec, kernel=kernel), wanted)
    finally:
        torch.set_num_threads(before)
    apart = [tensor.mT.contiguous().mT for tensor in (q, k, v)]
    assert torch.equal(attention(*apart, spec=spec, kernel=kernel), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_of_each_shape(kernel: str) -> None:
    q, k, v = numbers((2, 2, 5, 70, 64))
    full = torch.rand(2, 2, 5, 70, generator=torch.Generator().manual_seed(2)) > 0.5
    for part in (full, full[:1], full[:, :1], full[:, :, :1], full[..., :1]):
        wide = part.expand(2, 2, 5, 70)
        found = attention(q, k, v, spec=AttentionSpec(64), mask=part, kernel=kernel)
        assert torch.equal(
            found, attention(q, k, v, spec=AttentionSpec(64), mask=wide.contiguous(), kernel="reference")
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_to_attend(kernel: str) -> None:
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 0, 8)
    assert not attention(q, k, k, spec=AttentionSpec(8), kernel=kernel).any()
    assert attention(k, q, q, spec=AttentionSpec(8), kernel=kernel).shape == (1, 2, 0, 8)


def test_compiled_whole() -> None:
    q, k, v = numbers((1, 2, 9, 70, 64))
    spec = AttentionSpec(64)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q * 2, k, v, spec=spec) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), model(q, k, v))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"head_size": 6}, "head_size=6"),
        ({"head_size": 260}, "head_size=260"),
        ({"head_size": 64, "rotation": 32}, "rotation=32"),
        ({"head_size": 52, "rotation": 52}, "rotation=52"),
        ({"head_size": 64, "softmax_scale": float("nan")}, "softmax_scale=nan"),
        ({"head_size": 64, "kind": "int4"}, "kind='int4' is unknown; use int8 or int8_qk"),
    ],
    ids=str,
)
def test_specs_that_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionSpec(**changed)


@pytest.mark.parametrize("text", ["", "[]", '{"head_size": 64}', '{"head_size": 64, "rank": 1}'])
def test_texts_that_are_no_spec(text: str) -> None:
    with pytest.raises(ValueError, match="spec"):
        AttentionSpec.from_string(text)


def test_a_spec_as_text() -> None:
    for spec in (
        AttentionSpec(64),
        AttentionSpec(72, softmax_scale=0.3, smooth_key=False, rotation=72, kind="int8_qk"),
    ):
        assert AttentionSpec.from_string(spec.to_string()) == spec


def test_tensors_that_are_refused() -> None:
    q, k, v = numbers((1, 2, 3, 4, 8))
    spec = AttentionSpec(8)
    for tensors, words in (
        ((q[0], k, v), "q has shape"),
        ((q, k.half(), v), "k is torch.float16"),
        ((q, k[:, :1], v[:, :1]), "do not fit"),
        ((q, k, v[:, :, :3]), "do not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(*tensors, spec=spec)
    for mask, words in ((torch.ones(1, 1, 3, 4), "mask is"), (torch.ones(4, dtype=torch.bool), "mask has shape")):
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, spec=spec, mask=mask)
    with pytest.raises(ValueError, match="query_clip"):
        attention(q, k, v, spec=spec, tensors=AttentionTensors(query_clip=torch.ones(3)))


def test_kernels_that_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel='fast' is unknown; use auto, amx"):
        resolve_attention("fast", device=CPU)
    with pytest.raises(KernelUnavailableError, match="it runs on a CPU"):
        resolve_attention("portable", device=torch.device("cuda"))
    if not torch.cuda.is_available():
        assert resolve_attention("auto", device=torch.device("cuda")) == "reference"
