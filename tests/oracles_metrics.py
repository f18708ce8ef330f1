"""Independent float64 oracles of the metrics, in numpy alone; nothing of qvgen is imported.

SSIM is Wang et al. 2004, Eq. 13, written as scikit-image states it for gaussian_weights=True, sigma=1.5,
use_sample_covariance=False (weights cut at 3.5 sigma), with one window after the other instead of a convolution.
"""

from __future__ import annotations

import math

import numpy as np


def relative_error(student: np.ndarray, teacher: np.ndarray) -> float:
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    return math.fsum(((student - teacher) ** 2).ravel()) / math.fsum((teacher**2).ravel())


def sqnr_db(reference: np.ndarray, quantized: np.ndarray) -> float:
    return -10.0 * math.log10(relative_error(quantized, reference))


def psnr_db(a: np.ndarray, b: np.ndarray, *, max_value: float) -> float:
    error = (a.astype(np.float64) - b.astype(np.float64)).ravel()
    return 20.0 * math.log10(max_value) - 10.0 * math.log10(math.fsum(error**2) / error.size)


def flicker(video: np.ndarray) -> float:
    """Video [F, H, W, C]."""
    frames = video.astype(np.float64)
    return float(np.mean([np.abs(frames[f + 1] - frames[f]).mean() for f in range(len(frames) - 1)]))


def ssim_map(a: np.ndarray, b: np.ndarray, *, max_value: float) -> np.ndarray:
    """SSIM of two planes [H, W] at every pixel; beyond the border the plane is mirrored at its outermost pixel."""
    radius = int(3.5 * 1.5 + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights_1d = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(weights_1d, weights_1d)
    weights /= weights.sum()
    padded_a = np.pad(a.astype(np.float64), radius, mode="reflect")
    padded_b = np.pad(b.astype(np.float64), radius, mode="reflect")
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    result = np.empty(a.shape)
    for y in range(a.shape[0]):
        for x in range(a.shape[1]):
            window_a = padded_a[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            window_b = padded_b[y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            mean_a, mean_b = (weights * window_a).sum(), (weights * window_b).sum()
            variance_a = (weights * (window_a - mean_a) ** 2).sum()
            variance_b = (weights * (window_b - mean_b) ** 2).sum()
            covariance = (weights * (window_a - mean_a) * (window_b - mean_b)).sum()
            result[y, x] = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
                (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
            )
    return result


def ssim(a: np.ndarray, b: np.ndarray, *, max_value: float) -> float:
    """Videos [F, H, W, C]."""
    return float(
        np.mean(
            [
                ssim_map(a[f, :, :, c], b[f, :, :, c], max_value=max_value)
                for f in range(a.shape[0])
                for c in range(a.shape[3])
            ]
        )
    )
