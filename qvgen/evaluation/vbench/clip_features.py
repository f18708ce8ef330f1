"""CLIP's features of a video's frames, computed once for all dimensions that ask for them."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qvgen.evaluation.metrics.base import Clip
from qvgen.evaluation.networks.clip import load_clip
from qvgen.evaluation.placement import sampling_device
from qvgen.evaluation.vbench.frame_preparation import clip_images, clip_tensors

_FRAMES_AT_ONCE = 16


def clip_features(clip: Clip, path: Path, *, as_images: bool = False) -> Float[Tensor, "F D"]:
    """The features of all frames by the CLIP of a file, of any length, float32 on the CPU.

    Args:
        clip: The video.
        path: The file of weights.
        as_images: Whether frames are resized as images (Pillow) instead of as tensors.
    """
    network, prepare = load_clip(path), clip_images if as_images else clip_tensors

    def features() -> Tensor:
        parts = clip.frames.split(_FRAMES_AT_ONCE)
        images = (prepare(part, side=network.side).to(sampling_device()) for part in parts)
        return torch.cat([network.image_features(image).cpu() for image in images])

    return clip.once(f"clip {path} {as_images}", features)
