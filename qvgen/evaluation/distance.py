"""Distances between a quantized model and its teacher, and between their videos.

    relative error   sum |y_student - y_teacher|^2 / sum |y_teacher|^2        over all elements of all batches
    SQNR             10 log10( sum x^2 / sum (x - x_q)^2 )                    decibels
    PSNR             10 log10( max_value^2 / mean (a - b)^2 )                 decibels
    SSIM             mean over frames, channels and pixels of
                     (2 m_a m_b + c1)(2 v_ab + c2) / ((m_a^2 + m_b^2 + c1)(v_a + v_b + c2)),
                     m, v = mean and population (co)variance under a Gaussian window, sigma 1.5, 11 x 11 pixels,
                     c1 = (0.01 max_value)^2, c2 = (0.03 max_value)^2         Wang et al. 2004, Eq. 13
    flicker          mean |frame_{f+1} - frame_f|                             in the video's own units

Everything is summed in float64: a float32 sum of 10^8 squares is off in the third digit. Identical inputs give an
infinite PSNR or SQNR, which is the truth and sorts correctly; the report writes it to JSON as the string "inf".

Left out: what needs a network, or sets of videos; those are leaves (:mod:`qvgen.evaluation.metrics`), and so is what is
said of each: its source, range and direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional

PSNR_CUT_DB = 100.0
"""Where tables cut PSNR, so that equal videos do not make a mean infinite; what is above can't be seen by anybody."""

SSIM_SIGMA_PIXELS = 1.5
SSIM_WINDOW_PIXELS = 11
"""Width of the window of SSIM: cut at 3.5 sigma, rounded, it reaches 5 pixels to each side."""

SSIM_FRAMES_AT_ONCE = 4
"""Frames that SSIM works on at once: its float64 scratch is some fifteen planes of 8 bytes per value of a frame."""


def _check_pair(a: Tensor, b: Tensor, names: tuple[str, str]) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} has shape {list(a.shape)} and {names[1]} {list(b.shape)}; "
            "compare tensors of one shape (the same captions, seeds and frames)"
        )
    if a.numel() == 0:
        raise ValueError(f"{names[0]} is empty (shape {list(a.shape)}); compare at least one element")


def _ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); noise 0 is inf, a signal of 0 with noise is -inf, NaN stays NaN."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def squares(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> Float[Tensor, " 2"]:
    """The two sums of a relative error over one batch, float64: |student - teacher|^2 and |teacher|^2.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    _check_pair(student, teacher, ("student", "teacher"))
    reference = teacher.detach().double()
    return torch.stack(((student.detach().double() - reference).square().sum(), reference.square().sum()))


class RelativeError:
    """Relative error over any number of batches, each element weighted alike.

    It is the ratio of the sums, not the mean of the batches' ratios, so it does not depend on how the samples were cut
    into batches (to float64 rounding).

    Example:
        >>> import torch
        >>> error = RelativeError()
        >>> error.update(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
        >>> error.update(torch.tensor([0.0]), torch.tensor([2.0]))
        >>> round(error.compute(), 6)  # (0 + 1 + 4) / (1 + 4 + 4)
        0.555556
    """

    def __init__(self) -> None:
        self._squared_error: Tensor | float = 0.0
        self._squared_norm: Tensor | float = 0.0

    def update(self, student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> None:
        """Add one batch.

        Args:
            student: floating [...], the prediction that is judged.
            teacher: floating [...], the reference, same shape.

        Raises:
            ValueError: the shapes differ or are empty.
        """
        self.add(squares(student, teacher))

    def add(self, sums: Float[Tensor, " 2"]) -> None:
        """Add what :func:`squares` says of one batch."""
        # The sums stay on the device: reading them here would wait for the device in every batch.
        self._squared_error = self._squared_error + sums[0]
        self._squared_norm = self._squared_norm + sums[1]

    def compute(self) -> float:
        """Return the relative error of all batches so far, >= 0 (NaN where a prediction was NaN).

        Raises:
            ValueError: there was no batch, or the teacher's output is zero everywhere.
        """
        norm = float(self._squared_norm)
        if norm == 0.0:
            raise ValueError(
                "sum |y_teacher|^2 = 0, the relative error is undefined; update() with a teacher output that is not 0"
            )
        return float(self._squared_error) / norm


def relative_error(student: Float[Tensor, "*shape"], teacher: Float[Tensor, "*shape"]) -> float:
    """Relative error |student - teacher|^2 / |teacher|^2 of one pair of tensors; see :class:`RelativeError`."""
    error = RelativeError()
    error.update(student, teacher)
    return error.compute()


def sqnr_db(reference: Float[Tensor, "*shape"], quantized: Float[Tensor, "*shape"]) -> float:
    """Signal to quantization noise ratio in dB: -10 log10 of the relative error.

    Args:
        reference: floating [...], what was quantized.
        quantized: floating [...], its dequantized codes.

    Returns:
        dB; inf when nothing was lost, -inf for a reference of zeros that became something else.
    """
    _check_pair(reference, quantized, ("reference", "quantized"))
    signal = reference.detach().double()
    noise = signal - quantized.detach().double()
    return _ratio_db(signal.square().sum().item(), noise.square().sum().item())


def psnr_db(a: Num[Tensor, "*shape"], b: Num[Tensor, "*shape"], *, max_value: float) -> float:
    """Peak signal to noise ratio over all elements.

    Args:
        a: any dtype [...]; uint8 does not wrap, the difference is taken in float64.
        b: same shape.
        max_value: the largest possible value minus the smallest: 255 for uint8, 2 for [-1, 1].

    Returns:
        dB; inf when a equals b.
    """
    _check_pair(a, b, ("a", "b"))
    _check_max_value(max_value)
    mean_squared_error = (a.detach().double() - b.detach().double()).square().mean().item()
    return _ratio_db(max_value**2, mean_squared_error)


def _check_max_value(max_value: float) -> None:
    if not max_value > 0:
        raise ValueError(f"max_value={max_value} must be positive; use 255 for uint8 and 2 for pixels in [-1, 1]")


def ssim(
    a: Num[Tensor, "*batch height width channels"],
    b: Num[Tensor, "*batch height width channels"],
    *,
    max_value: float,
) -> float:
    """Structural similarity of two videos, frame by frame, averaged over frames and channels.

    In float64, the window separated: a library's 11 x 11 convolution took 14 s and 2 GB for one frame of 480 x 720. The
    tests hold it to scikit-image's. One rule for all sizes: the mean runs over every pixel, and windows that
    reach beyond the frame see it mirrored at the border pixel. (scikit-image averages the same map but leaves out the
    outer 5 pixels; of a 16 x 16 frame that would keep 14 %.) Mirroring needs more pixels than it adds, so frames
    under 6 pixels are refused.

    Args:
        a: any dtype [..., H, W, C], frames with channels last, as ``generate`` returns them.
        b: same shape.
        max_value: the range of values: 255 for uint8, 2 for [-1, 1].

    Returns:
        In [-1, 1]; exactly 1 for identical inputs.

    Raises:
        ValueError: shapes differ, no frame, or a frame under 6 x 6 pixels.
    """
    _check_pair(a, b, ("a", "b"))
    _check_max_value(max_value)
    smallest = SSIM_WINDOW_PIXELS // 2 + 1
    if a.dim() < 3 or min(a.shape[-3:-1]) < smallest:
        raise ValueError(
            f"shape {list(a.shape)} is no [..., height, width, channels] with at least {smallest} x {smallest} pixels, "
            "which SSIM's 11 pixel window needs; enlarge the frames or leave SSIM out"
        )
    frames_a, frames_b = (x.detach().flatten(0, -4) if x.dim() > 3 else x.detach()[None] for x in (a, b))
    total = 0.0
    for start in range(0, frames_a.shape[0], SSIM_FRAMES_AT_ONCE):
        part = slice(start, start + SSIM_FRAMES_AT_ONCE)
        total += float(_ssim_map(frames_a[part], frames_b[part], max_value=float(max_value)).sum())
    return total / frames_a.numel()


def _ssim_map(a: Tensor, b: Tensor, *, max_value: float) -> Tensor:
    """SSIM of every value of frames [F, H, W, C], float64 [F * C, 1, H, W]."""
    height, width = a.shape[1:3]
    x, y = (frames.movedim(-1, 1).reshape(-1, 1, height, width).double() for frames in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    variance_x, variance_y = _blur(x * x) - mean_x * mean_x, _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    numerator = (mean_x * mean_y + mean_x * mean_y + c1) * (covariance + covariance + c2)
    return numerator / ((mean_x * mean_x + mean_y * mean_y + c1) * (variance_x + variance_y + c2))


def _blur(planes: Tensor) -> Tensor:
    """Mean under the Gaussian window, planes [N, 1, H, W] mirrored at the border: rows and columns one after the other."""
    half = SSIM_WINDOW_PIXELS // 2
    offsets = torch.arange(-half, half + 1, dtype=torch.float64, device=planes.device)
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA_PIXELS**2))
    window = window / window.sum()
    padded = functional.pad(planes, (half, half, half, half), mode="reflect")
    return functional.conv2d(functional.conv2d(padded, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def flicker(video: Num[Tensor, "*batch frames height width channels"]) -> float:
    """Mean absolute change from each frame to the next; meant for captions that ask for standing still.

    There any change is unwanted. On moving captions the number measures the motion instead.

    Args:
        video: any dtype [..., F, H, W, C], F >= 2.

    Returns:
        >= 0, in the video's own units (0..255 levels for uint8).

    Raises:
        ValueError: fewer than two frames.
    """
    if video.dim() < 4 or video.shape[-4] < 2 or video.numel() == 0:
        raise ValueError(
            f"shape {list(video.shape)} is no [..., frames, height, width, channels] with at least 2 frames"
        )
    frames = video.detach().double()
    return frames.diff(dim=-4).abs().mean().item()


@dataclass(frozen=True, kw_only=True)
class FlipCount:
    """The number of values that differ.

    Attributes:
        num_flipped: values that differ, in [0, num_values].
        num_values: values compared.
    """

    num_flipped: int
    num_values: int

    @property
    def share(self) -> float:
        """Share of the values that differ, in [0, 1]."""
        return self.num_flipped / self.num_values


def count_flips(a: Num[Tensor, "*shape"], b: Num[Tensor, "*shape"]) -> FlipCount:
    """Count the elements in which two tensors of discrete values differ (codes, uint8 videos).

    Args:
        a: integer [...], codes or pixels; every channel of a pixel counts by itself.
        b: integer [...], same shape.

    Returns:
        The count, exact.

    Raises:
        ValueError: the shapes differ or are empty, or a tensor is floating point, where no value is a code.
    """
    _check_pair(a, b, ("a", "b"))
    for name, x in (("a", a), ("b", b)):
        if x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; count flips of integer codes or uint8 pixels, before dequantizing")
    return FlipCount(num_flipped=int((a != b).sum()), num_values=a.numel())
