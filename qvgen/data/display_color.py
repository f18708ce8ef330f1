"""Colours of wide primaries on a display with BT.709's: through linear light, what lies outside is cut off.

    R'G'B' --transfer--> light --(RGB of wide primaries -> XYZ -> RGB of BT.709)--> light, clipped to 0..1 --> R'G'B'

Both have the white D65, so greys stay as they are. Light is what a display shows: gamma 2.4 for the transfers of cameras
(BT.1886), sRGB's own curve for sRGB.

Source: BT.709, BT.2020, SMPTE RP 431-2 / EG 432-1 (P3), BT.1886, IEC 61966-2-1. Left out: gamut mapping other than clipping.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float, UInt8

BT709 = 1
"""H.273's code of BT.709's primaries."""

_CHROMATICITIES = {
    BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # P3 with D65
}
_D65 = (0.3127, 0.3290)

WIDE = frozenset(_CHROMATICITIES) - {BT709}
"""H.273's codes of the primaries that are converted."""

_GAMMAS = {4: 2.2, 5: 2.8}
_CAMERA_GAMMA = 2.4
_SRGB = 13


def to_bt709(
    picture: UInt8[np.ndarray, "height width 3"], *, primaries: int, transfer: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Show a picture of wide primaries on a display of BT.709.

    Args:
        picture: R'G'B', full range.
        primaries: H.273's code, of :data:`WIDE`.
        transfer: H.273's code of an ordinary (not HDR) transfer.

    Returns:
        R'G'B' of BT.709, full range, rounded.
    """
    light = _to_light(np.arange(256, dtype=np.float32) / 255, transfer)[picture]
    light = np.clip(light @ _matrix(primaries).T.astype(np.float32), 0, 1)
    shown: UInt8[np.ndarray, "height width 3"] = np.rint(255 * _from_light(light, transfer)).astype(np.uint8)
    return shown


@functools.cache
def _matrix(primaries: int) -> Float[np.ndarray, "3 3"]:
    """Linear RGB of some primaries -> linear RGB of BT.709, float64."""
    matrix: Float[np.ndarray, "3 3"] = np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)
    return matrix


def _to_xyz(primaries: int) -> Float[np.ndarray, "3 3"]:
    """Linear RGB -> XYZ: columns are the primaries, scaled so that 1, 1, 1 is the white of luminance 1."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in _CHROMATICITIES[primaries]]).T
    x, y = _D65
    matrix: Float[np.ndarray, "3 3"] = columns * np.linalg.solve(columns, np.array([x / y, 1, (1 - x - y) / y]))
    return matrix


def _to_light(level: Float[np.ndarray, "*shape"], transfer: int) -> Float[np.ndarray, "*shape"]:
    if transfer == _SRGB:
        return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    light: Float[np.ndarray, "*shape"] = level ** _GAMMAS.get(transfer, _CAMERA_GAMMA)
    return light


def _from_light(light: Float[np.ndarray, "*shape"], transfer: int) -> Float[np.ndarray, "*shape"]:
    if transfer == _SRGB:
        return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    level: Float[np.ndarray, "*shape"] = light ** (1 / _GAMMAS.get(transfer, _CAMERA_GAMMA))
    return level
