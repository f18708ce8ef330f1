"""Videos of a model, as its family usually samples them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvgen.data.source import Split
from qvgen.evaluation.placement import placed
from qvgen.models.base import Encode, VideoDiT

BATCH_SIZE = 32
"""Videos that a family is asked for at once."""


def batch_size(family: VideoDiT) -> int:
    """How many videos belong together, because they are computed together: their bits may depend on each other's number.

    A family with ``samples_apart = True`` computes one video after another whatever it is asked for.
    """
    return 1 if getattr(family, "samples_apart", False) else BATCH_SIZE


@torch.no_grad()
def generate_videos(
    family: VideoDiT,
    model: nn.Module,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    encode: Encode | None = None,
) -> Tensor:
    """One video per caption and seed, as the family usually samples: uint8 [B, F, H, W, 3]."""
    with placed(model):
        parts = [
            family.generate(
                model,
                captions[start : start + BATCH_SIZE],
                seeds[start : start + BATCH_SIZE],
                num_steps=family.num_inference_steps,
                guidance_scale=family.guidance_scale,
                negative_prompts=None if negative_prompts is None else negative_prompts[start : start + BATCH_SIZE],
                encode=encode,
            )
            for start in range(0, len(captions), BATCH_SIZE)
        ]
    return joined(parts)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches of videos as one, uint8 [B, F, H, W, 3]; B is 0 where there are none."""
    return torch.cat(list(parts)) if parts else torch.empty(0, 1, 1, 1, 3, dtype=torch.uint8)


def held_out_items(split: Split, count: int) -> list[Mapping[str, Any]]:
    """The first items of a split, from its beginning again where it has fewer."""
    return [split.samples[index % len(split)] for index in range(count)]
