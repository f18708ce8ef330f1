"""Windows of timesteps: equal shares of the sampling steps, made of whole noise bands.

Window 0 is where sampling begins. Schedules with a shift spend most steps in strong noise, so that equal shares of the
axis of timesteps could hold no step at all; here they are shares of the steps that a schedule visits.
"""

from __future__ import annotations

from collections.abc import Sequence


def band_windows(visited: Sequence[int], *, num_windows: int, num_bands: int) -> tuple[int, ...]:
    """The window of every noise band.

    Args:
        visited: Noise bands of a schedule's sampling steps, in any order.
        num_windows: Windows; >= 1.
        num_bands: Noise bands of the model.

    Returns:
        Window of each band from the cleanest (0) on; never rising with the band. A band that was not visited is in the
        window of the nearest one that was, the noisier of two.

    Raises:
        ValueError: The steps visit fewer bands than there are windows.

    Example:
        >>> band_windows([9, 8, 6, 2], num_windows=2, num_bands=10)
        (1, 1, 1, 1, 1, 1, 1, 0, 0, 0)
    """
    bands = sorted(set(visited), reverse=True)
    if len(bands) < num_windows:
        raise ValueError(
            f"{len(visited)} sampling steps visit {len(bands)} noise bands, too few for {num_windows} windows; "
            "use more init.steps or fewer init.windows"
        )
    window = {band: index * num_windows // len(bands) for index, band in enumerate(bands)}
    return tuple(
        window[min(bands, key=lambda visited_band: (abs(visited_band - band), -visited_band))]
        for band in range(num_bands)
    )
