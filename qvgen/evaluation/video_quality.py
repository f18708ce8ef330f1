"""Metrics of generated videos beside the teacher's of the same captions and seeds: rows of the report's table.

LPIPS needs a network that is fetched by `qvgen assets`; where it is not there, or damaged, the reason stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvgen.data.assets import find_asset
from qvgen.evaluation.classifier import ATTRIBUTES, VIDEO_SHAPE, load_classifier
from qvgen.evaluation.damage import Damage, visual_damage
from qvgen.evaluation.distance import flicker, psnr_db, ssim
from qvgen.evaluation.networks import lpips
from qvgen.evaluation.quality_data import VariantQuality

STILL = "standing still"


@dataclass(frozen=True, kw_only=True)
class LpipsState:
    """The metric LPIPS, or the reason why there is none.

    Attributes:
        distance: The metric; None: it is not there.
        absent: Why it is not there; None: it is there.
    """

    distance: Damage | None
    absent: str | None


def find_lpips() -> LpipsState:
    """LPIPS with the weights of the asset."""
    if find_asset(lpips.ASSET) is None:
        return LpipsState(distance=None, absent=f"its weights were not fetched: qvgen assets names=[{lpips.ASSET}]")
    try:
        return LpipsState(distance=visual_damage("lpips"), absent=None)
    except (ValueError, OSError) as error:
        return LpipsState(distance=None, absent=str(error))


def video_quality(
    name: str, videos: Tensor, *, teacher: Tensor, items: Sequence[Mapping[str, Any]], lpips_state: LpipsState
) -> VariantQuality:
    """Measure the row of one variant.

    Args:
        name: Name of the variant.
        videos: uint8 [B, F, H, W, 3], one for each item.
        teacher: Videos of the full-precision model, of the same shape.
        items: The request of each video: its caption, and attributes where the data has them.
        lpips_state: LPIPS or why there is none.
    """
    # SSIM of a large video takes minutes on a CPU core.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampled, exact = videos.to(device), teacher.to(device)
    still = [index for index, item in enumerate(items) if STILL in item["caption"]]
    compared, distance = name != "teacher", lpips_state.distance
    captions = [item["caption"] for item in items]
    return VariantQuality(
        name=name,
        psnr_db=psnr_db(sampled, exact, max_value=255) if compared else None,
        ssim=ssim(sampled, exact, max_value=255) if compared else None,
        lpips=distance.measure(videos, teacher, captions) if compared and distance is not None else None,
        flicker=flicker(sampled[still]) if still and sampled.shape[1] > 1 else None,
        accuracy=_accuracy(videos, items),
    )


def _accuracy(videos: Tensor, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of the videos that show what was asked for; empty for data without labels, or of another size."""
    if not all(name in items[0] for name in ATTRIBUTES) or tuple(videos.shape[1:]) != VIDEO_SHAPE:
        return {}
    return load_classifier().accuracy(videos, attribute_labels(items))


def attribute_labels(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The classes that the captions ask for, int64 [B] by attribute."""
    return {name: torch.tensor([int(item[name]) for item in items]) for name in ATTRIBUTES}
