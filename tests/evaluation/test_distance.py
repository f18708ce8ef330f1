"""Metrics against the float64 oracles of tests/oracles_metrics.py (numpy, another order of operations).

Tolerance 1e-12 relative where only the order of float64 sums differs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qvgen.evaluation.distance import (
    SSIM_FRAMES_AT_ONCE,
    FlipCount,
    RelativeError,
    count_flips,
    flicker,
    psnr_db,
    relative_error,
    sqnr_db,
    ssim,
)
from tests import oracles_metrics as oracles


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def video_pair(
    generator: torch.Generator, shape: tuple[int, ...], noise: float = 20.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A uint8 video with structure, and the same with noise."""
    base = torch.rand(shape, generator=generator).cumsum(-2)
    first = (base / base.max() * 255).round()
    second = (first + noise * torch.randn(shape, generator=generator)).clamp(0, 255).round()
    return first.to(torch.uint8), second.to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_relative_error_equals_the_oracle(generator: torch.Generator, dtype: torch.dtype) -> None:
    teacher = torch.randn(3, 4, 5, generator=generator).to(dtype)
    student = (teacher + 0.1 * torch.randn(3, 4, 5, generator=generator)).to(dtype)
    expected = oracles.relative_error(student.double().numpy(), teacher.double().numpy())
    assert relative_error(student, teacher) == pytest.approx(expected, rel=1e-12)


def test_relative_error_does_not_depend_on_the_cut_into_batches(generator: torch.Generator) -> None:
    teacher = torch.randn(12, 5, generator=generator) * torch.arange(1, 13)[:, None]
    student = teacher + torch.randn(12, 5, generator=generator)
    whole = relative_error(student, teacher)
    for size in (1, 5, 7):
        error = RelativeError()
        for start in range(0, 12, size):
            error.update(student[start : start + size], teacher[start : start + size])
        assert error.compute() == pytest.approx(whole, rel=1e-12)
    # The mean of the batches' ratios is another number: this tells the two apart.
    mean_of_ratios = np.mean([relative_error(student[i], teacher[i]) for i in range(12)])
    assert abs(mean_of_ratios - whole) > 0.01 * whole


def test_relative_error_sums_in_float64() -> None:
    # 1e8 + 1 is 1e8 in float32: a float32 sum would lose all the small terms.
    teacher = torch.cat([torch.tensor([1e4]), torch.ones(1000)])
    assert relative_error(torch.zeros(1001), teacher) == 1.0
    assert relative_error(teacher + torch.cat([torch.zeros(1), torch.ones(1000)]), teacher) == 1000 / (1e8 + 1000)


def test_relative_error_of_known_cases(generator: torch.Generator) -> None:
    teacher = torch.randn(10, generator=generator)
    assert relative_error(teacher, teacher) == 0.0
    assert relative_error(torch.zeros(10), teacher) == 1.0
    assert math.isnan(relative_error(torch.full((10,), math.nan), teacher))


def test_relative_error_keeps_no_graph_and_leaves_gradients_alone() -> None:
    student = torch.ones(3, requires_grad=True)
    error = RelativeError()
    error.update(student * 2, torch.ones(3))
    assert error.compute() == 1.0
    assert student.grad is None


def test_relative_error_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match=r"student has shape \[2\] and teacher \[1, 2\]"):
        relative_error(torch.ones(2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="undefined"):
        relative_error(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="undefined"):
        RelativeError().compute()
    with pytest.raises(ValueError, match="empty"):
        relative_error(torch.ones(0), torch.ones(0))


def test_sqnr_equals_the_oracle_and_its_limits(generator: torch.Generator) -> None:
    x = torch.randn(6, 7, generator=generator)
    quantized = (x * 4).round() / 4
    assert sqnr_db(x, quantized) == pytest.approx(oracles.sqnr_db(x.numpy(), quantized.numpy()), rel=1e-12)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    # Halving the step of a fine uniform quantizer gains 6.02 dB (one bit); 0.2 dB for the 20 000 samples.
    x = torch.rand(20000, generator=generator)
    steps = [(x * n).round() / n for n in (64, 128)]
    assert sqnr_db(x, steps[1]) - sqnr_db(x, steps[0]) == pytest.approx(6.02, abs=0.2)


def test_psnr_equals_the_oracle(generator: torch.Generator) -> None:
    a, b = video_pair(generator, (3, 8, 9, 3))
    expected = oracles.psnr_db(a.numpy(), b.numpy(), max_value=255.0)
    assert psnr_db(a, b, max_value=255.0) == pytest.approx(expected, rel=1e-12)
    assert psnr_db(b, a, max_value=255.0) == psnr_db(a, b, max_value=255.0)
    # The same videos as pixels in [-1, 1] have the same PSNR with max_value 2.
    scaled = [x.double() / 127.5 - 1 for x in (a, b)]
    assert psnr_db(*scaled, max_value=2.0) == pytest.approx(expected, rel=1e-12)


def test_psnr_of_uint8_does_not_wrap() -> None:
    black, white = torch.zeros(4, dtype=torch.uint8), torch.full((4,), 255, dtype=torch.uint8)
    assert psnr_db(black, white, max_value=255.0) == 0.0
    assert psnr_db(white, white, max_value=255.0) == math.inf
    with pytest.raises(ValueError, match="max_value=0 must be positive"):
        psnr_db(black, white, max_value=0)


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (1, 6, 9, 1), (2, 23, 12, 3)])
def test_ssim_equals_the_oracle(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    # torchmetrics takes E[x^2] - E[x]^2, the oracle E[(x - m)^2]: they differ by about 255^2 * 2^-52 / c2 = 2e-13.
    a, b = video_pair(generator, shape)
    expected = oracles.ssim(a.numpy(), b.numpy(), max_value=255.0)
    assert ssim(a, b, max_value=255.0) == pytest.approx(expected, abs=1e-11)
    scaled = [x.double() / 255 for x in (a, b)]
    assert ssim(*scaled, max_value=1.0) == pytest.approx(expected, abs=1e-11)


def test_ssim_orders_and_ends(generator: torch.Generator) -> None:
    a, slightly = video_pair(generator, (2, 16, 16, 3), noise=5.0)
    noisy = (slightly.double() + 60 * torch.randn(a.shape, generator=generator)).clamp(0, 255)
    assert ssim(a, a, max_value=255.0) == 1.0
    assert 1.0 > ssim(a, slightly, max_value=255.0) > ssim(a.double(), noisy, max_value=255.0) > -1.0


def test_ssim_judges_each_frame_by_itself(generator: torch.Generator) -> None:
    num_frames = 19
    assert num_frames > 2 * SSIM_FRAMES_AT_ONCE  # more than one part
    a, b = video_pair(generator, (num_frames, 8, 8, 3))
    alone = [ssim(a[f], b[f], max_value=255.0) for f in range(num_frames)]
    assert ssim(a, b, max_value=255.0) == pytest.approx(np.mean(alone), abs=1e-13)
    batched = ssim(a[:18].unflatten(0, (2, 9)), b[:18].unflatten(0, (2, 9)), max_value=255.0)
    assert batched == pytest.approx(np.mean(alone[:18]), abs=1e-13)


def test_ssim_refuses_frames_that_cannot_be_mirrored() -> None:
    with pytest.raises(ValueError, match=r"\[2, 5, 16, 3\].*at least 6 x 6 pixels"):
        ssim(torch.ones(2, 5, 16, 3), torch.ones(2, 5, 16, 3), max_value=1.0)
    with pytest.raises(ValueError, match="shape"):
        ssim(torch.ones(16, 16), torch.ones(16, 16), max_value=1.0)


def test_flicker_equals_the_oracle_and_known_cases(generator: torch.Generator) -> None:
    video, _ = video_pair(generator, (5, 4, 6, 3))
    assert flicker(video) == pytest.approx(oracles.flicker(video.numpy()), rel=1e-12)
    assert flicker(torch.stack([video, video])) == pytest.approx(flicker(video), rel=1e-12)
    assert flicker(video[:1].expand(4, -1, -1, -1)) == 0.0
    blinking = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None, None].expand(3, 2, 2, 3)
    assert flicker(blinking) == 255.0
    with pytest.raises(ValueError, match="at least 2 frames"):
        flicker(video[:1])


def test_count_flips() -> None:
    a = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    b = a.clone()
    b[0, 0], b[2, 3] = 255, 0
    assert count_flips(a, b) == FlipCount(num_flipped=2, num_values=12)
    assert count_flips(a, b).share == pytest.approx(2 / 12)
    assert count_flips(a, a).num_flipped == 0
    with pytest.raises(ValueError, match=r"a is torch\.float32"):
        count_flips(a.float(), b)
