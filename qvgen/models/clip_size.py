"""Sizes of clips that a VAE and patches divide."""

from __future__ import annotations

from typing import Any


def check_sizes(family: Any, *, temporal: int, multiple: int) -> None:
    """Hold a family's sizes to what its autoencoder and its patches divide.

    Args:
        family: Its ``height``, ``width``, ``num_frames`` and ``sampling_frames`` are looked at.
        temporal: Frames of a latent frame but the first.
        multiple: Pixels along a side of a patch.

    Raises:
        ValueError: One does not fit; the message names a value near it that does.
    """
    for key in ("height", "width"):
        if (value := getattr(family, key)) < multiple or value % multiple:
            raise ValueError(
                f"model.{key}={value} is no multiple of {multiple}, VAE times patches; "
                f"use {max(1, round(value / multiple)) * multiple}"
            )
    for key in ("num_frames", "sampling_frames"):
        if (value := getattr(family, key)) < 1 or (value - 1) % temporal:
            raise ValueError(
                f"model.{key}={value} is not 1 more than a multiple of {temporal}; "
                f"use {max(0, round((value - 1) / temporal)) * temporal + 1}"
            )
