"""Latents and embedding of one clip of a table, unless they are in the cache already or another process makes them now.

One clip and one caption are encoded at a time: a content never depends on batch mates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qvgen import work_item
from qvgen.data.captions import Clip
from qvgen.data.claims import Claims
from qvgen.data.clip_report import CountTokens, left_out, warn_of_cut_captions
from qvgen.data.clips import to_pixels
from qvgen.data.clips_ahead import ReadClip, Unreadable
from qvgen.data.latent_cache import FIRST_FRAME, LatentCache
from qvgen.data.video import Frames

log = logging.getLogger(__name__)

EncodeVideo = Callable[[Tensor], Tensor]
"""float32 [1, 3, F, H, W] in [-1, 1] -> latents [1, C, f, h, w]."""

EncodeCaptions = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> named tensors with a row for each."""

EncodeFirstFrame = Callable[[Tensor], Mapping[str, Tensor]]
"""float32 [1, 3, F, H, W] in [-1, 1] -> named tensors with a row for each clip: what its first frame becomes."""


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The functions that a cache is filled with.

    Attributes:
        video: Pure function of a clip.
        captions: Pure function of captions.
        tokens_left_out: Caption -> how many of its tokens ``captions`` leaves out.
        first_frame: Pure function of a clip; None for a model that is told no image.
    """

    video: EncodeVideo
    captions: EncodeCaptions
    tokens_left_out: CountTokens
    first_frame: EncodeFirstFrame | None = None


class CacheWriter:
    """Makes what a cache lacks, and what no other process makes at the moment.

    Args:
        cache: The cache.
        claims: The claims of this process in the cache.
        encoders: What it is filled with.

    Attributes:
        encoded: Clips that were encoded here.
        reused: Clips whose latents were there.
    """

    def __init__(self, cache: LatentCache, claims: Claims, encoders: Encoders) -> None:
        self.cache, self.claims, self.encoders = cache, claims, encoders
        self.encoded = self.reused = 0

    def make(self, clip: Clip, read: ReadClip | Unreadable) -> dict[str, Any]:
        """Latents and embedding of a clip, unless they are there; returns its record."""
        if isinstance(read, Unreadable):
            log.warning("%s: %s", clip.name, read.reason)
            return {"bad": read.reason, "again": read.again}
        key = self.cache.latent_key(read.sha256, read.cut)
        with self.claims.held(key):  # a clip of another row, or of another table, may be the same
            seal = self.cache.latent_seal(key, verify=True)
            if seal is not None:
                self.reused += 1
            else:
                pixels = to_pixels(read.frames)[None]
                latents = self.encoders.video(pixels)
                _check(latents, what=f"encode_video, on {clip.name},")
                first = self._first_frame(pixels, read.frames, name=clip.name)
                seal = self.cache.write_latents(key, latents[0], first_frame=first)
                self.encoded += 1
        return {
            "clip": read.sha256,
            "latents": key,
            "bucket": read.cut.bucket.label,
            "latents_sha256": seal,
            "text_sha256": self._make_text(clip.caption),
            "left_out": left_out(read.cut, tokens=self.encoders.tokens_left_out(clip.caption)),
        }

    def _first_frame(self, pixels: Tensor, frames: Frames, *, name: str) -> dict[str, Tensor]:
        """A clip's first frame and what it becomes; nothing for a model that is told no image."""
        if self.encoders.first_frame is None:
            return {}
        found = self.encoders.first_frame(pixels)
        for key, tensor in found.items():
            _check(tensor, what=f"encode_first_frame, on {name}, in {key}")
        return {FIRST_FRAME: torch.from_numpy(frames[0].copy()), **{key: tensor[0] for key, tensor in found.items()}}

    def make_prompts(self, captions: Sequence[str]) -> None:
        """Encode captions that belong to no clip, the empty one too; says which ones are too long."""
        warn_of_cut_captions(captions, tokens_left_out=self.encoders.tokens_left_out)
        for caption in dict.fromkeys(["", *captions]):
            work_item.begin(f"caption {caption!r}")
            self._make_text(caption)

    def _make_text(self, caption: str) -> str:
        """Encode a caption unless its embedding is there, as it was written; returns its seal."""
        with self.claims.held(self.cache.text_key(caption)):
            seal = self.cache.text_seal(caption, verify=True)
            if seal is not None:
                return seal
            tensors = self.encoders.captions([caption])
            for name, tensor in tensors.items():
                _check(tensor, what=f"encode_captions, on {caption!r}, in {name}")
            return self.cache.write_text(caption, {name: tensor[0] for name, tensor in tensors.items()})


def _check(tensor: Tensor, *, what: str) -> None:
    """One row, all finite: a VAE in float16 may overflow, and one such clip would spoil a whole training."""
    if len(tensor) != 1:
        raise ValueError(f"{what} gave {list(tensor.shape)}; its first size must be 1")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} gave values that are not finite; run it in float32 or bfloat16")
