"""The frames that VBench's video networks are given, against their definitions pixel by pixel in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvgen.evaluation.vbench.frame_preparation import middle_frames, tag2text_images, umt_tensors, viclip_tensors
from tests.evaluation.vbench import published_networks as published


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [(49, 8, [2, 8, 14, 20, 26, 32, 38, 45]), (8, 8, list(range(8))), (3, 5, [0, 1, 2, 2, 2]), (1, 2, [0, 0])],
)
def test_the_middle_frame_of_each_part_is_taken_and_the_last_one_repeated(
    frames: int, count: int, expected: list[int]
) -> None:
    video = torch.arange(frames, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert middle_frames(video, count).flatten().tolist() == expected


def _frames() -> torch.Tensor:
    return torch.randint(256, (2, 20, 34, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _levels(found: torch.Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> np.ndarray:
    """Normalized pixels back in levels."""
    shift, scale = (np.array(values).reshape(1, 3, 1, 1) for values in (mean, deviation))
    return 255 * (found.double().numpy() * scale + shift)


@pytest.mark.parametrize("cubic", [True, False])
def test_frames_are_resized_rounded_and_cut_as_published(cubic: bool) -> None:
    """ViCLIP's by bicubic to a shorter side of 14, UMT's by bilinear to 16 of which the middle 14 are kept."""
    short, prepare = (14, viclip_tensors) if cubic else (16, umt_tensors)
    size = (short, int(short * 34 / 20))
    means = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    levels = _levels(prepare(_frames(), side=14), *(means if cubic else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
    assert np.abs(levels - levels.round()).max() < 1e-3  # whole levels
    top, left = (round((length - 14) / 2) for length in size)
    for frame, found in zip(_frames().permute(0, 3, 1, 2).double(), levels, strict=True):
        big = published.resize(frame, size, (20 / size[0], 34 / size[1]), cubic=cubic)
        expected = big[:, top : top + 14, left : left + 14].clamp(0, 255).numpy()
        # Half a level of rounding, and float32 near a tie.
        np.testing.assert_allclose(found, expected, atol=0.501)


def test_an_image_for_tag2text_is_a_square_of_averages() -> None:
    """Halving by Pillow's triangle of two pixels: weights 1, 3, 3, 1 over 8 in the middle of the image."""
    frames = _frames()[:, :, :20]
    levels = _levels(tag2text_images(frames, side=10), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    weights = np.array([1, 3, 3, 1]) / 8
    part = frames.double().numpy()[0, 7:11, 9:13]
    expected = np.einsum("y,x,yxc->c", weights, weights, part)
    np.testing.assert_allclose(levels[0, :, 4, 5], expected, atol=1.01)  # two passes, each rounded to whole levels
    assert levels.shape == (2, 3, 10, 10)
