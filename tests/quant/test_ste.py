"""Straight-through gradients against float64 autograd of the oracle, and that oracle against finite differences.

Float32 and float64 must round to the same codes for a comparison to mean anything: inputs are drawn so that nothing
lies near a tie, which every test asserts.
"""

import itertools

import numpy as np
import pytest
import torch

from qvgen.quant.affine import choose_qparams, qparams_to_rows, round_rows, row_extremes, to_rows
from qvgen.quant.grid import Grid
from qvgen.quant.ste import dynamic_fake_quantize_backward, fake_quantize_backward
from tests import oracles

KINDS = ("integer", "real", "none")
WIDTH, GROUP = 24, 8
FAR = 1e-4
"""Distance from a tie, in codes, that is safe: float32 errs by at most 2^8 codes * 2^-22 = 6e-5."""


def make_grid(bits, kind="integer", granularity="per_token", scale_dtype="float32"):
    group = GROUP if granularity == "per_group" else None
    return Grid(bits=bits, granularity=granularity, zero_point=kind, group_size=group, scale_dtype=scale_dtype)


def draw(rows, *, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator) * scale


def assert_near(got, expected, *, rtol=1e-5):
    """Compare float32 with float64.

    Sums of at most 24 terms err by 24 * 2^-24 of the sum of their magnitudes, which cancellation in ds makes a few
    times the largest gradient: 1e-5 of the largest entry.
    """
    expected = torch.as_tensor(expected)
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= rtol * max(float(expected.abs().max()), 1e-30)


def parts(row, grid):
    size = grid.group_size or len(row)
    return [row[start : start + size] for start in range(0, len(row), size)]


# --------------------------------------------------------------------------- learned scale and zero point


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_learned_gradients_match_float64_autograd(kind, granularity):
    for bits in range(2, 9):
        grid = make_grid(bits, kind, granularity)
        x, grad = draw(4, seed=bits), draw(4, seed=bits + 100)
        x[0, 3] = x[1, 9] = 7.0  # outliers beyond the learned range: clamped
        x[2, 20] = -7.0
        scale, zero = choose_qparams(x, grid=grid)
        scale = scale * torch.linspace(0.43, 1.317, 4)[:, None]
        zero = zero + (0.3 if kind == "real" else 0.0)
        got = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=grid)
        clamped = 0
        for m, (row, row_grad) in enumerate(zip(x.double(), grad.double(), strict=True)):
            for g, (part, part_grad) in enumerate(zip(parts(row, grid), parts(row_grad, grid), strict=True)):
                s, z = scale[m, g].double(), zero[m, g].double()
                assert oracles.tie_distance(part.numpy(), s.item(), z.item(), kind=kind) > FAR
                leaves = [value.clone().requires_grad_() for value in (part, s, z)]
                oracles.ste_fake_quantize(*leaves, bits=bits, kind=kind).backward(part_grad)
                columns = slice(g * len(part), (g + 1) * len(part))
                assert_near(got[0][m, columns], leaves[0].grad)
                # dz and ds have terms of the size s * g and q * g.
                assert abs(got[1][m, g].item() - leaves[1].grad.item()) <= 1e-5 * 2**bits * part_grad.abs().sum()
                expected = 0.0 if kind == "none" else leaves[2].grad.item()
                assert abs(got[2][m, g].item() - expected) <= 1e-5 * s * part_grad.abs().sum()
                clamped += int((leaves[0].grad == 0).sum())
        assert clamped  # the clamp's branch was met


def test_golden_gradients():
    """On s = 1, z = 1, codes 0..3, so the range is -1..2; x = -1.75, -0.75, 0.25, 1.25, 3; g = 1, 2, 3, 4, 5.

    m = 0 1 1 1 0 (-1.75 rounds to code -1, 3 to code 4). dx = g m. ds = sum g ((q - z) - m x):
    1 (-1) + 2 (-1 + 0.75) + 3 (0 - 0.25) + 4 (1 - 1.25) + 5 (2) = -1 - 0.5 - 0.75 - 1 + 10. dz = -(1 + 5).
    """
    x = torch.tensor([[-1.75, -0.75, 0.25, 1.25, 3.0]])
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    one = torch.ones(1, 1)
    got = fake_quantize_backward(grad, x, scale=one, zero_point=one, grid=make_grid(2))
    assert [value.tolist() for value in got] == [[[0.0, 2.0, 3.0, 4.0, 0.0]], [[6.75]], [[-6.0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_the_derivative_of_the_frozen_function(kind):
    """Finite differences of the surrogate: rounding errors and clamped elements stay as they are at the point."""
    generator = np.random.default_rng(5)
    for bits in (2, 3, 4):
        x, grad = generator.normal(size=8), generator.normal(size=8)
        scale = oracles.choose_qparams(x, bits=bits, kind=kind)[0] * 0.6
        zero = {"integer": 2.0, "real": 1.3, "none": 0.0}[kind]
        assert oracles.tie_distance(x, scale, zero, kind=kind) > FAR
        at = (x, scale, zero)

        def loss(point, at=at, bits=bits, grad=grad):
            return grad @ oracles.surrogate_fake_quantize(point[:-2], *point[-2:], at=at, bits=bits, kind=kind)

        expected = oracles.finite_difference(loss, np.array([*x, scale, zero]))
        leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in at]
        oracles.ste_fake_quantize(*leaves, bits=bits, kind=kind).backward(torch.from_numpy(grad))
        got = np.concatenate([leaf.grad.reshape(-1).numpy() for leaf in leaves])
        # Central differences in float64: step^2 plus 1e-16 / step, both about 1e-10 times the curvature.
        np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-7)


# --------------------------------------------------------------------------- dynamic range


def dynamic_oracle(row, grad, clip_low, clip_high, grid, *, through_zero_point=True):
    """Gradients of one row and its two clips in float64."""
    leaves = [row.clone().requires_grad_(), *(torch.as_tensor(float(c)).double() for c in (clip_low, clip_high))]
    for leaf in leaves[1:]:
        leaf.requires_grad_()
    options = {"bits": grid.bits, "kind": grid.zero_point, "scale_dtype": grid.scale_dtype}
    options |= {"through_zero_point": through_zero_point}
    values = [oracles.ste_dynamic_fake_quantize(part, *leaves[1:], **options) for part in parts(leaves[0], grid)]
    torch.cat(values).backward(grad)
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def far_from_ties(row, clip_low, clip_high, grid):
    for part in parts(row.numpy(), grid):
        options = {"bits": grid.bits, "kind": grid.zero_point, "clip_low": clip_low, "clip_high": clip_high}
        plain, _ = oracles.choose_qparams(part, **options)
        scale, zero = oracles.choose_qparams(part, **options, scale_dtype=grid.scale_dtype)
        low = np.array([min(0.0, *part) * clip_low])
        distances = [oracles.tie_distance(part, scale, zero, kind=grid.zero_point)]
        distances.append(oracles.scale_tie_distance(plain, grid.scale_dtype))
        if grid.zero_point == "integer":
            distances.append(oracles.tie_distance(low, scale, 0.0, kind="integer"))
        if min(distances) <= FAR:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_token", "per_group"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("through", [True, False])
def test_dynamic_gradients_match_float64_autograd(kind, granularity, scale_dtype, through):
    """With the path through minimum and maximum, for two-sided and one-sided rows."""
    compared = 0
    for bits in range(2, 9):
        grid = make_grid(bits, kind, granularity, scale_dtype)
        x, grad = draw(8, seed=bits), draw(8, seed=bits + 100)
        x[2], x[3] = x[2].abs(), -x[3].abs()
        clips = [torch.linspace(0.7, 0.95, 8)[:, None], torch.linspace(0.9, 0.6, 8)[:, None]]
        got = dynamic_fake_quantize_backward(grad, x, clips=(clips[0], clips[1]), grid=grid, through_zero_point=through)
        for m, row in enumerate(x.double()):
            low, high = (clip[m].item() for clip in clips)
            if not far_from_ties(row, low, high, grid):
                continue
            compared += 1
            expected = dynamic_oracle(row, grad[m].double(), low, high, grid, through_zero_point=through)
            # An extreme collects ds / qmax, and ds sums up to 2^bits codes times 24 gradients.
            bound = 1e-5 * grad[m].abs().sum()
            assert (got[0][m].double() - expected[0]).abs().max() <= bound
            for value, true in zip(got[1:], expected[1:], strict=True):
                assert value.shape == (8, 1)
                assert abs(value[m].item() - true.item()) <= bound * row.abs().max()
    assert compared > 0.7 * 7 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", [True, False])
def test_the_path_through_the_range_is_a_derivative_too(kind, through):
    """Finite differences of s(x), z(x) composed with the frozen function: the oracle's dynamic gradient, and ours.

    Where the gradient stops at the zero point, the function is the one whose z stays what it is at the point.
    """
    generator = np.random.default_rng(11)
    bits, clips = 3, (0.8, 0.7)
    x, grad = generator.normal(size=9), generator.normal(size=9)
    _, top = oracles.limits(bits, kind)

    def qparams(point):
        row, low, high = point[:-2], *point[-2:]
        if kind == "none":
            return np.abs(row).max() * high / top, 0.0
        scale = (row.max() * high - row.min() * low) / top
        return scale, -row.min() * low / scale

    start = np.array([*x, *clips])
    scale, real_zero = qparams(start)
    zero = np.rint(real_zero) if kind == "integer" else real_zero
    assert oracles.tie_distance(x, scale, zero, kind=kind) > FAR

    def loss(point):
        s, z = qparams(point)
        moved = z - real_zero + zero if through else zero  # the rounding error of z is frozen as well
        at = (x, scale, zero)
        return grad @ oracles.surrogate_fake_quantize(point[:-2], s, moved, at=at, bits=bits, kind=kind)

    expected = oracles.finite_difference(loss, start)
    grid, inputs = make_grid(bits, kind), (torch.from_numpy(x), torch.from_numpy(grad))
    got = dynamic_oracle(*inputs, *clips, grid, through_zero_point=through)
    got = torch.cat([value.reshape(-1) for value in got]).numpy()
    if kind == "none":
        assert expected[-2] == 0
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)  # curvature of 1/s times step^2
    rows, factors = ([value.float()[None] for value in inputs], [torch.full((1, 1), clip) for clip in clips])
    ours = dynamic_fake_quantize_backward(
        rows[1], rows[0], clips=(factors[0], factors[1]), grid=grid, through_zero_point=through
    )
    assert_near(torch.cat([value.reshape(-1) for value in ours]), expected)


def test_a_gradient_that_stops_at_the_zero_point_is_another_one():
    """By hand: s = 1, z = 1 from -1..2 on codes 0..3, x = -1, 0, 2, 0.25; g = 0, 0, 0, 3: only 0.25 -> 0 has an error.

    ds = 3 (0 - 0.25) = -0.75, dz = 0 as nothing is clamped: the same either way. With the maximum clipped to 1 (s = 2/3,
    z = 1.5, rounded to 2) the code of 2 is clamped from 5 to 3: with g = 1 there ds = 3 - 2 = 1 and dz = -s = -2/3,
    which adds dz lo / s^2 = 1.5 to ds and -dz / s = 1 to dlo.
    """
    x, grad = torch.tensor([[-1.0, 0.0, 2.0, 0.25]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    clips = torch.ones(1, 1), torch.full((1, 1), 0.5)
    through, stopped = (
        dynamic_fake_quantize_backward(grad, x, clips=clips, grid=make_grid(2), through_zero_point=through)
        for through in (True, False)
    )
    torch.testing.assert_close(through[2], torch.tensor([[2 * 2.5 / 3]]))
    torch.testing.assert_close(stopped[2], torch.tensor([[2 * 1.0 / 3]]))
    torch.testing.assert_close(through[1], torch.tensor([[-(1 - 2.5 / 3)]]))
    torch.testing.assert_close(stopped[1], torch.tensor([[1.0 / 3]]))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_extremes_share_evenly(kind):
    x = draw(1, seed=2).clamp(-2, 2)
    x[0, [1, 5, 7]], x[0, [2, 3]] = -2.5, 2.5
    grad, clips = draw(1, seed=3), torch.tensor([[0.9], [0.7]])
    grid = make_grid(3, kind)
    low, high = clips.double().flatten().tolist()
    assert far_from_ties(x[0].double(), low, high, grid)
    got = dynamic_fake_quantize_backward(grad, x, clips=(clips[:1], clips[1:]), grid=grid)
    expected = dynamic_oracle(x[0].double(), grad[0].double(), low, high, grid)
    for value, true in zip(got, expected, strict=True):
        assert_near(value.reshape(true.shape), true)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float16"])
def test_no_gradient_through_a_scale_at_its_floor(kind, scale_dtype):
    """Rows far below the floor: the scale is a constant, so in range dx = g and the clips have no gradient."""
    grid = make_grid(4, kind, scale_dtype=scale_dtype)
    floor = oracles.round_scale(0.0, scale_dtype)
    x, grad = draw(3, seed=4) * float(floor) * 0.1, draw(3, seed=5)
    x[2] = 0.0
    ones = torch.ones(3, 1)
    got = dynamic_fake_quantize_backward(grad, x, clips=(ones, ones), grid=grid)
    scale, zero = choose_qparams(x, grid=grid, clip_low=ones, clip_high=ones)
    torch.testing.assert_close(scale, torch.full_like(scale, float(floor)), rtol=1e-6, atol=0.0)
    assert torch.equal(zero.round(), torch.zeros_like(zero))
    for m, row in enumerate(x.double()):
        expected = dynamic_oracle(row, grad[m].double(), 1.0, 1.0, grid)
        for value, true in zip(got, expected, strict=True):
            # Everything is a product of two float32 numbers here; the clips' gradients are sums of them.
            assert (value[m].double().reshape(true.shape) - true).abs().max() <= 1e-6 * grad[m].abs().max()
        assert torch.equal(got[0][m], grad[m]) or kind == "real"


# --------------------------------------------------------------------------- laws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_token", "per_group"])
def test_a_disturbed_token_changes_no_other_gradient(kind, granularity):
    grid = make_grid(4, kind, granularity)
    x, grad = draw(6, seed=6), draw(6, seed=7)
    clips = torch.full((6, 1), 0.9), torch.full((6, 1), 0.8)
    scale, zero = choose_qparams(x, grid=grid)
    others = torch.arange(6) != 2
    before = dynamic_fake_quantize_backward(grad, x, grid=grid, clips=clips)
    learned = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=grid)
    for value, grad_value in itertools.product((0.0, 1e30, -3.0, float("nan")), (0.0, 1e30, float("inf"))):
        x_new, grad_new = x.clone(), grad.clone()
        x_new[2], grad_new[2] = value, grad_value
        after = dynamic_fake_quantize_backward(grad_new, x_new, grid=grid, clips=clips)
        after_learned = fake_quantize_backward(grad_new, x_new, scale=scale, zero_point=zero, grid=grid)
        for old, new in zip((*before, *learned), (*after, *after_learned), strict=True):
            assert torch.equal(old[others], new[others])


@pytest.mark.parametrize("kind", KINDS)
def test_special_rows_have_finite_gradients(kind):
    x = torch.stack(
        [
            torch.zeros(WIDTH),
            torch.full((WIDTH,), 0.7),
            torch.full((WIDTH,), -0.7),
            torch.full((WIDTH,), 1e30),
            torch.full((WIDTH,), 1e-30),
        ]
    )
    grad, ones = draw(5, seed=8), torch.ones(5, 1) * 0.95
    for bits in range(2, 9):
        for value in dynamic_fake_quantize_backward(grad, x, clips=(ones, ones), grid=make_grid(bits, kind)):
            assert value.isfinite().all()


def test_leading_dimensions_and_per_tensor():
    x, grad = draw(6, seed=9), draw(6, seed=10)
    ones = torch.ones(6, 1)
    grid = make_grid(4)
    flat = dynamic_fake_quantize_backward(grad, x, clips=(ones, ones), grid=grid)
    shaped = dynamic_fake_quantize_backward(
        grad.reshape(2, 3, WIDTH),
        x.reshape(2, 3, WIDTH),
        clips=(ones.reshape(2, 3, 1), ones.reshape(2, 3, 1)),
        grid=grid,
    )
    for one, other in zip(flat, shaped, strict=True):
        assert other.shape[:2] == (2, 3)
        assert torch.equal(one, other.reshape(one.shape))
    whole = make_grid(4, granularity="per_tensor")
    scale, zero = choose_qparams(x, grid=whole)
    got = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=whole)
    row = fake_quantize_backward(
        grad.reshape(1, -1), x.reshape(1, -1), scale=scale[:, None], zero_point=zero[:, None], grid=grid
    )
    assert [value.shape for value in got] == [x.shape, (1,), (1,)]
    for one, other in zip(got, row, strict=True):
        assert torch.equal(one.reshape(-1), other.reshape(-1))


# --------------------------------------------------------------------------- the same bits as the plain formulas


def plain_gradients(grad, rows, scale, zero_point, grid):
    """Equations 1 to 3 as they are written, in row layout."""
    scaled = rows * (1.0 / scale)
    unclamped = (scaled + zero_point).round() + 0.0 if grid.zero_point == "real" else scaled.round() + zero_point
    codes = unclamped.clamp(grid.qmin, grid.qmax)
    grad_x = torch.where(unclamped == codes, grad, 0.0)
    grad_scale = (grad * (codes - zero_point)).sum(-1, keepdim=True)
    grad_scale = grad_scale - (grad_x * rows).sum(-1, keepdim=True) / scale
    return grad_x, grad_scale, (grad_x - grad).sum(-1, keepdim=True) * scale


def plain_share(mask, value):
    return torch.where(mask, value / mask.sum(-1, keepdim=True).clamp(min=1), 0.0)


def same_bits(got, expected):
    return torch.equal(got.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def rows_of_every_kind(seed):
    """Ordinary rows; outliers; ties of both extremes; one-sided, constant, zero, tiny and huge rows; zeros of both signs."""
    x = draw(12, seed=seed)
    x[0, 3], x[0, 17] = 40.0, -30.0
    x[1] = x[1].round()
    x[2], x[3] = x[2].abs(), -x[3].abs()
    x[4], x[5], x[6] = 2.5, -2.5, 0.0
    x[7, ::2], x[7, 1::4] = -0.0, 0.0
    x[8], x[9] = x[8] * 1e-12, x[9] * 1e30
    x[10, 1::2] = x[10, ::2]
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_token", "per_group"])
def test_fast_selections_have_the_bits_of_the_plain_formulas(kind, granularity):
    for bits, scale_dtype in itertools.product((2, 3, 8), ("float32", "float16")):
        grid = make_grid(bits, kind, granularity, scale_dtype)
        x, grad = rows_of_every_kind(bits), draw(12, seed=bits + 50)
        grad[:, ::5] = -0.0
        low, high = (torch.full((12, 1), value) for value in (0.8, 0.7))
        scale, zero = choose_qparams(x, grid=grid, clip_low=low, clip_high=high)
        rows, grads = to_rows(x, grid), to_rows(grad, grid)
        s, z, c_low, c_high = (qparams_to_rows(value, grid) for value in (scale, zero, low, high))
        grad_x, grad_s, grad_z = plain_gradients(grads, rows, s, z, grid)
        got = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=grid)
        assert same_bits(got[0], grad_x.reshape(x.shape))
        assert same_bits(got[1], grad_s.reshape(scale.shape))
        if kind != "none":
            assert same_bits(got[2], grad_z.reshape(scale.shape))
        bottom, top = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        floor = 1e-8 if scale_dtype == "float32" else float(torch.finfo(torch.float16).smallest_normal)
        ceiling = torch.finfo(grid.torch_scale_dtype).max
        if kind == "none":
            top = rows.abs().amax(-1, keepdim=True)
            span = top * c_high / grid.qmax
            grad_high = torch.where((span > floor) & (span < ceiling), grad_s / grid.qmax, 0.0)
            grad_x = grad_x + plain_share(rows.abs() == top, grad_high * c_high) * rows.sign()
        else:
            free = kind == "real"  # ranges need not contain 0
            lo, hi = (bottom, top) if free else (bottom.clamp(max=0.0), top.clamp(min=0.0))
            lo, hi = lo * c_low, hi * c_high
            ds = grad_s + grad_z * lo / (s * s)
            span = (hi - lo) / grid.qmax
            grad_high = torch.where((span > floor) & (span < ceiling), ds / grid.qmax, 0.0)
            grad_low = -grad_z / s - grad_high
            grad_x = grad_x + plain_share((rows == bottom) & ((bottom < 0) | free), grad_low * c_low)
            grad_x = grad_x + plain_share((rows == top) & ((top > 0) | free), grad_high * c_high)
        dynamic = dynamic_fake_quantize_backward(grad, x, clips=(low, high), grid=grid)
        assert same_bits(dynamic[0], grad_x.reshape(x.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["per_token", "per_group"])
def test_what_the_forward_pass_knows_need_not_be_computed_again(kind, granularity):
    grid = make_grid(3, kind, granularity)
    x, grad = rows_of_every_kind(5), draw(12, seed=6)
    low, high = clips = torch.full((12, 1), 0.9), torch.full((12, 1), 0.6)
    extremes = row_extremes(to_rows(x, grid), grid)
    scale, zero = choose_qparams(x, grid=grid, extremes=extremes, clip_low=low, clip_high=high)
    for given, alone in zip((scale, zero), choose_qparams(x, grid=grid, clip_low=low, clip_high=high), strict=True):
        assert same_bits(given, alone)
    rounded = round_rows(x, scale=scale, zero_point=zero, grid=grid)
    known = dynamic_fake_quantize_backward(grad, x, grid=grid, extremes=extremes, rounded=rounded, clips=clips)
    alone = dynamic_fake_quantize_backward(grad, x, grid=grid, clips=clips)
    learned = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=grid, rounded=rounded)
    learned_alone = fake_quantize_backward(grad, x, scale=scale, zero_point=zero, grid=grid)
    for got, expected in zip((*known, *learned), (*alone, *learned_alone), strict=True):
        assert same_bits(got, expected)
    short = round_rows(x, scale=scale, zero_point=zero, grid=grid, with_unclamped=False)
    assert short.unclamped is None
    assert same_bits(short.centered, rounded.centered)
