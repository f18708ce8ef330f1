"""Frames as VBench hands them to its networks (vbench/utils.py): resized, cut and normalized as published.

Two ways of resizing are published: of tensors, bilinear or bicubic without antialiasing, whose values may leave [0, 255]; and
of images by Pillow, which antialiases and rounds to whole levels. Both shorten the longer side to a whole number of pixels.
Where frames are read as whole levels (ViCLIP's), or resized by OpenCV (UMT's), a tensor's values are rounded too.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SIDE = 224
_DETECTORS_LARGEST, _DETECTORS_SIDE = 768, 720.0


def sizes(height: int, width: int, *, side: int) -> tuple[int, int]:
    """Height and width with a shorter side of ``side`` pixels, the longer one rounded down.

    >>> sizes(480, 832, side=224)
    (224, 388)
    """
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def middle_frames(frames: UInt8[Tensor, "F H W 3"], count: int) -> UInt8[Tensor, "N H W 3"]:
    """The middle frame of each of ``count`` equal parts of a video; the last one again where there are fewer frames."""
    parts = min(count, len(frames))
    borders = np.linspace(0, len(frames), parts + 1).astype(int).tolist()
    chosen = [(first + last - 1) // 2 for first, last in pairwise(borders)]
    return frames[chosen + [chosen[-1]] * (count - parts)]


def viclip_tensors(frames: UInt8[Tensor, "F H W 3"], *, side: int) -> Float[Tensor, "F 3 S S"]:
    """Frames for ViCLIP: as CLIP's tensors, rounded to whole levels in [0, 255] between resizing and normalizing."""
    pixels = _resized(frames, side=side, mode="bicubic").round().clamp(0, 255)
    return _normalized(_middle(pixels, side) / 255, CLIP_MEAN, CLIP_DEVIATION)


def umt_tensors(frames: UInt8[Tensor, "F H W 3"], *, side: int) -> Float[Tensor, "F 3 S S"]:
    """Frames for UMT: resized (bilinear) to a shorter side of 8/7 of ``side``, rounded, the square in the middle, normalized.

    OpenCV interpolates in fixed point, which may round a level the other way.
    """
    pixels = _resized(frames, side=side * 8 // 7, mode="bilinear").round()
    return _normalized(_middle(pixels, side) / 255, IMAGENET_MEAN, IMAGENET_DEVIATION)


def tag2text_images(frames: UInt8[Tensor, "F H W 3"], *, side: int) -> Float[Tensor, "F 3 S S"]:
    """Frames for Tag2Text: resized as images (bilinear) to a square, whatever their shape, and normalized."""
    from PIL import Image

    resized = [
        np.asarray(Image.fromarray(frame.numpy()).resize((side, side), Image.Resampling.BILINEAR)) for frame in frames
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    return _normalized(pixels.float() / 255, IMAGENET_MEAN, IMAGENET_DEVIATION)


def detector_pixels(frames: UInt8[Tensor, "F H W 3"], *, whole_levels: bool) -> Float[Tensor, "F 3 h w"]:
    """Frames for GRiT: levels in [0, 255], shrunk to a shorter side of 720 pixels where it has more than 768.

    Args:
        frames: The frames.
        whole_levels: Shrink without antialiasing and round to whole levels, as OpenCV does for *color*; otherwise antialias,
            as tensors are resized for the other dimensions.
    """
    pixels = frames.permute(0, 3, 1, 2).float()
    height, width = frames.shape[1:3]
    if min(height, width) <= _DETECTORS_LARGEST:
        return pixels
    scale = _DETECTORS_SIDE / min(height, width)
    size = (int(scale * height), int(scale * width))
    smaller = functional.interpolate(
        pixels, size=size, mode="bilinear", align_corners=False, antialias=not whole_levels
    )
    return smaller.round() if whole_levels else smaller


def clip_tensors(frames: UInt8[Tensor, "F H W 3"], *, side: int) -> Float[Tensor, "F 3 S S"]:
    """Frames for CLIP: resized as tensors (bicubic), the square in the middle, normalized; float32 [F, 3, side, side]."""
    pixels = _resized(frames, side=side, mode="bicubic")
    return _normalized(_middle(pixels, side) / 255, CLIP_MEAN, CLIP_DEVIATION)


def clip_images(frames: UInt8[Tensor, "F H W 3"], *, side: int) -> Float[Tensor, "F 3 S S"]:
    """Frames for CLIP: resized as images by Pillow (bicubic), the square in the middle, normalized."""
    from PIL import Image

    height, width = sizes(frames.shape[1], frames.shape[2], side=side)
    resized = [
        np.asarray(Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    return _normalized(_middle(pixels, side).float() / 255, CLIP_MEAN, CLIP_DEVIATION)


def dino_tensors(frames: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F 3 H2 W2"]:
    """Frames for DINO: resized as tensors (bilinear), whole, normalized; the shorter side has 224 pixels."""
    return _normalized(_resized(frames, side=DINO_SIDE, mode="bilinear") / 255, IMAGENET_MEAN, IMAGENET_DEVIATION)


def _resized(frames: Tensor, *, side: int, mode: str) -> Tensor:
    pixels = frames.permute(0, 3, 1, 2).float()
    size = sizes(frames.shape[1], frames.shape[2], side=side)
    return functional.interpolate(pixels, size=size, mode=mode, align_corners=False)


def _middle(pixels: Tensor, side: int) -> Tensor:
    top, left = (round((length - side) / 2) for length in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


def _normalized(pixels: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    shift, scale = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (mean, deviation))
    return (pixels - shift) / scale
