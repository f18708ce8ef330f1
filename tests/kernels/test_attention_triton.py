"""The quantized attention's Triton kernels, interpreted on the CPU, against the exact reference and an oracle, bit for bit.

Every access is held to the tensors that a kernel was given. What the interpreter can't show is the compiled code:
test_triton_code.py looks at that. Nothing here ran on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvgen_kernels.attention import AttentionSpec, AttentionTensors, attention, attention_kernels, resolve_attention
from qvgen_kernels.attention.reference import quantize_keys, quantize_queries, quantize_values, score_factors
from qvgen_kernels.attention.triton.backend import triton_attention
from qvgen_kernels.errors import KernelUnavailableError
from tests.kernels.attention_oracle import attend
from tests.kernels.triton_interpreter import _quiet_numpy, attention_quantize

pytest.importorskip(
    "triton", minversion="3.9", reason="asserted with an interpreter whose fused multiply-add rounds once"
)
__all__ = ["_quiet_numpy"]
NOTHING = AttentionTensors()


def numbers(shape, *, size=1.0, dtype=torch.float32):
    """Queries, keys with a common offset, and values of B, H, M, N, D."""
    batch, heads, queries, keys, head_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, heads, queries, head_size, generator=generator) * size
    k, v = (torch.randn(batch, heads, keys, head_size, generator=generator) for _ in range(2))
    k += 2 * torch.randn(batch, heads, 1, head_size, generator=generator)
    return [tensor.to(dtype) for tensor in (q, k, v)]


def seen(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.4


def check(q, k, v, *, spec=None, mask=None, tensors=NOTHING):
    """The outputs, which are the reference's."""
    spec = spec or AttentionSpec(q.shape[-1])
    found = triton_attention(q, k, v, mask=mask, tensors=tensors, spec=spec)
    wanted = attention(q, k, v, spec=spec, mask=mask, tensors=tensors, kernel="reference")
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize(
    ("shape", "size", "dtype", "mask"),
    [
        ((1, 1, 5, 130, 64), 6.0, torch.bfloat16, None),
        ((1, 2, 65, 63, 64), 1.0, torch.float32, (1, 2, 1, 63)),
        ((2, 1, 3, 65, 72), 0.2, torch.float16, (2, 1, 3, 65)),
        ((1, 1, 2, 64, 96), 3.0, torch.bfloat16, (1, 1, 2, 1)),
        ((1, 1, 2, 199, 128), 3.0, torch.float32, (1, 1, 1, 199)),
        ((1, 1, 1, 1, 128), 1.0, torch.bfloat16, None),
        ((1, 1, 2, 3, 4), 40.0, torch.float32, None),
        ((1, 1, 2, 66, 256), 1.0, torch.float16, None),
    ],
    ids=str,
)
def test_outputs_are_the_reference_s(shape, size, dtype, mask):
    check(*numbers(shape, size=size, dtype=dtype), mask=None if mask is None else seen(*mask))


@pytest.mark.parametrize(
    ("shape", "size", "dtype", "mask"),
    [
        ((1, 1, 5, 130, 64), 6.0, torch.bfloat16, None),
        ((1, 2, 3, 63, 64), 1.0, torch.float32, (1, 2, 1, 63)),
        ((2, 1, 3, 65, 72), 0.2, torch.float16, (2, 1, 3, 65)),
        ((1, 1, 2, 67, 128), 3.0, torch.bfloat16, (1, 1, 1, 67)),
    ],
    ids=str,
)
def test_plain_values_are_the_reference_s_but_for_the_order_of_sums(shape, size, dtype, mask):
    """By the stated bound: (64 + blocks) 2^-22 of the sum of |P v|, and a rounding to the inputs' type."""
    q, k, v = numbers(shape, size=size, dtype=dtype)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    spec, mask = AttentionSpec(shape[4], kind="int8_qk"), None if mask is None else seen(*mask)
    found = triton_attention(q, k, v, mask=mask, tensors=NOTHING, spec=spec)
    wanted, magnitude = (
        attention(q, k, value, spec=spec, mask=mask, kernel="reference").double() for value in (v, v.abs())
    )
    assert found.dtype is dtype
    bound = (64 + -(-shape[3] // 64)) * 2.0**-22 * magnitude + torch.finfo(dtype).eps * wanted.abs()
    assert ((found.double() - wanted).abs() <= bound).all()


def test_plain_values_that_are_whole_numbers_have_the_reference_s_bits():
    """Sums of whole numbers are exact in any order, so nothing but them is free: codes, exponents, probabilities, weights."""
    q, k, v = numbers((1, 2, 4, 130, 64), size=3.0)
    mask = seen(1, 1, 4, 130)
    mask[..., 2, :], mask[..., 3, :64] = False, False
    clips = AttentionTensors(query_clip=torch.tensor([0.7, 1.0]), key_clip=torch.tensor([1.0, 0.8]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = [tensor.to(dtype) for tensor in (q, k, (v * 2).round().clamp(-4, 4))]
        check(*given, spec=AttentionSpec(64, rotation=64, kind="int8_qk"), mask=mask, tensors=clips)


def test_plain_values_that_are_not_finite_change_no_other_head():
    q, k, v = numbers((1, 3, 2, 66, 8))
    v[0, 0, 9, 6], v[0, 2, 3, 1] = torch.nan, 1e30
    found = triton_attention(q, k, v, mask=None, tensors=NOTHING, spec=AttentionSpec(8, kind="int8_qk"))
    assert found.isnan().all(-1).all(-1).tolist() == [[True, False, True]]
    assert found[0, 1].isfinite().all()


def test_outputs_are_the_oracle_s():
    q, k, v = numbers((1, 2, 4, 70, 8), size=2.0)
    spec = AttentionSpec(8, rotation=8)
    mask = seen(1, 1, 4, 70)
    mask[..., 2, :] = False
    clips = AttentionTensors(query_clip=torch.tensor([0.7, 1.0]), key_clip=torch.tensor([1.0, 0.8]))
    found = check(q, k, v, spec=spec, mask=mask, tensors=clips)
    for head in range(2):
        wanted = attend(
            *(tensor[0, head].numpy() for tensor in (q, k, v)),
            seen=mask[0, 0].numpy(),
            factor=spec.score_factor,
            smooth_key=True,
            rotation=8,
            query_clip=clips.query_clip[head].item(),
            key_clip=clips.key_clip[head].item(),
        )
        assert np.array_equal(found[0, head].numpy(), wanted)
    assert not found[:, :, 2].any()


@pytest.mark.parametrize("head_size", [72, 128])
def test_rotations_and_keys_as_they_are(head_size):
    q, k, v = numbers((1, 1, 3, 5, head_size), dtype=torch.bfloat16)
    check(q, k, v, spec=AttentionSpec(head_size, rotation=head_size, smooth_key=False, softmax_scale=1.5))


@pytest.mark.parametrize("rise", [60.0, 400.0])
def test_keys_that_outweigh_all_before(rise):
    """Sums are rescaled by every block, at last below the size at which they are dropped; then by none."""
    q, k, v = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 320, 4), numbers((1, 1, 2, 320, 4))[2]
    k += rise * torch.tensor([0.0, 1.0, 2.0, 2.0, 1.0]).repeat_interleave(64).view(1, 1, 320, 1)
    mask = torch.ones(1, 1, 2, 320, dtype=torch.bool)
    mask[..., 1, 64:192] = False  # two blocks without a key that the query sees
    check(q, k, v, spec=AttentionSpec(4, smooth_key=False, softmax_scale=0.2), mask=mask)


def test_sums_that_have_become_small_are_dropped():
    """A column that only the first block has, at 2^-60 and again 2^-62 of the weight of later ones."""
    q, k, v = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 192, 4), numbers((1, 1, 1, 192, 4))[2]
    k[:, :, 1:64:2], k[:, :, 64:128], k[:, :, 128:] = 2.0, 54.0, 108.0
    v[..., 0] = 0.0
    v[:, :, :64:2, 0], v[:, :, 1:64:2, 0] = -1.0, 1.0
    spec = AttentionSpec(4, smooth_key=False, softmax_scale=0.2)
    assert not check(q, k, v, spec=spec)[..., 0].any()
    assert check(q, k[:, :, :128], v[:, :, :128], spec=spec)[..., 0].all()


def test_blocks_without_keys_come_first_too():
    q, k, v = numbers((1, 1, 2, 130, 8))
    mask = torch.ones(1, 1, 1, 130, dtype=torch.bool)
    mask[..., :64] = False
    check(q, k, v, mask=mask)


def test_rows_that_are_not_finite_change_no_other():
    q, k, v = numbers((1, 3, 4, 66, 64))
    clean = check(q, k, v)
    q[0, 0, 3, 5] = torch.nan
    k[0, 1, 65, 2] = torch.inf
    v[0, 2, 9, 60] = torch.nan
    found = check(q, k, v)
    assert found.isnan().all(-1).tolist() == [[[False] * 3 + [True], [True] * 4, [True] * 4]]
    assert torch.equal(found[0, 0, :3], clean[0, 0, :3])


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 3e38])
def test_extreme_values_and_columns(value):
    q, k, v = numbers((1, 1, 2, 6, 8))
    v[..., 0], v[0, 0, 1], k[0, 0, 2] = value, value, value
    check(q, k, v)


def test_scores_beyond_float32():
    """A factor no steeper than the head's keys allow; keys that no factor helps."""
    large = [torch.full((1, 1, 2, 4), value) for value in (1e30, 1e30, 1.0)]
    spec = AttentionSpec(4, smooth_key=False)
    for sign in (1, -1):
        assert (check(sign * large[0], *large[1:], spec=spec) == 1).all()
    assert check(large[0], 1e3 * large[1], large[2], spec=spec).isnan().all()
    for scale in (3.0, 1e6):
        check(*numbers((1, 1, 2, 70, 8)), spec=AttentionSpec(8, softmax_scale=scale))


def test_scores_below_the_smallest_normal_number():
    """An exponent just above 0 is rounded up to 1, though it is a subnormal number."""
    q, k, v = numbers((1, 1, 2, 6, 8))
    check(q * 1e-6, k * 1e-3, v, spec=AttentionSpec(8, smooth_key=False, softmax_scale=1e-32))


def test_strides_change_no_bit():
    q, k, v = numbers((2, 1, 3, 5, 16))
    wanted = check(q, k, v)
    moved = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert torch.equal(check(*moved, mask=torch.ones(1, dtype=torch.bool).expand(2, 1, 3, 5)), wanted)
    assert torch.equal(check(*(tensor.mT.contiguous().mT for tensor in (q, k, v))), wanted)


def test_nothing_to_attend():
    q, k = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 0, 8)
    assert not check(q, k, k).any()
    assert check(k, q, q).shape == (1, 2, 0, 8)


def test_codes_are_the_reference_s_and_values_lie_in_the_stated_order():
    q, k, v = numbers((1, 2, 3, 70, 36))
    spec, tensors = AttentionSpec(36), AttentionTensors(key_clip=torch.tensor([0.6, 1.0]))
    found = attention_quantize.quantize(q, k, v, tensors=tensors, spec=spec)
    query, key = quantize_queries(q, tensors=tensors, spec=spec), quantize_keys(k, tensors=tensors, spec=spec)
    factor, _ = score_factors(query[1], key[1], quantize_values(v, spec=spec)[1], spec=spec)
    for codes, scale, wanted, count in (
        (found.query, found.factor, (query[0], factor), 3),
        (found.key, found.key_scale, key, 70),
    ):
        assert torch.equal(codes[:, :count, :36].float(), wanted[0].flatten(0, 1))
        assert torch.equal(scale[:, :count, None], wanted[1].flatten(0, 1))
        assert not codes[..., 36:].any()
        assert not codes[:, count:].any()
    codes, scale, mean = (part.flatten(0, 1) for part in quantize_values(v, spec=spec))
    token = torch.arange(64)  # 0bFEDCBA lies at 0bFECBDA
    place = (token & 0b110001) | (token & 0b000110) << 1 | (token & 0b001000) >> 2
    lying = found.value[..., place].transpose(2, 3).flatten(1, 2)
    assert torch.equal(lying[:, :70, :36].float(), codes)
    assert not lying[:, 70:].any()
    assert torch.equal(found.base, 128 * found.value.int().sum(-1, dtype=torch.int32) + 0x4B400000)
    assert torch.equal(found.value_scale[:, None, :36], scale)
    assert torch.equal(found.mean[:, None, :36], mean)
    assert not torch.equal(mean[:, 0], v.flatten(0, 1).flip(1).mean(1))  # another order is another sum


def test_it_is_refused_where_there_is_no_gpu():
    with pytest.raises(KernelUnavailableError, match="it runs on CUDA and ROCm devices, and the tensors are on cpu"):
        resolve_attention("triton", device=torch.device("cpu"))
    if not torch.cuda.is_available():
        assert "torch finds no GPU" in attention_kernels(torch.device("cuda"))["triton"]
