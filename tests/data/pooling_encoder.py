"""Two small real encoders for tests, and a program that fills a cache with them in a process of its own."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from qvgen.data.cache_fill import FillOptions, fill
from qvgen.data.captions import read_table
from qvgen.data.clip_report import FillReport
from qvgen.data.clips import Bucket, CutSettings
from qvgen.data.latent_cache import CacheSettings, LatentCache

SETTINGS = CacheSettings(
    cut=CutSettings(fps=8, buckets=(Bucket(frames=5, height=32, width=48), Bucket(frames=5, height=48, width=32))),
    vae_revision="pool-4",
    text_revision="bytes-8",
)


def encode_video(pixels: Tensor) -> Tensor:
    """Average over 4 x 4 pixels: [B, 3, F, H, W] -> [B, 3, F, H/4, W/4]."""
    return avg_pool3d(pixels, (1, 4, 4))


def encode_captions(captions: Sequence[str]) -> dict[str, Tensor]:
    """Eight numbers that depend on the caption: [B, 2, 4]."""
    rows = [list(hashlib.sha256(caption.encode()).digest()[:8]) for caption in captions]
    return {"encoder_hidden_states": torch.tensor(rows).float().view(-1, 2, 4) / 7}


def fill_with_pooling(
    table: Path, folder: Path, *, options: FillOptions | None = None, **changes: object
) -> FillReport:
    """Fill a cache; ``changes`` replace the two encoders."""
    encoders = {"encode_video": encode_video, "encode_captions": encode_captions} | changes
    return fill(LatentCache(folder, settings=SETTINGS), read_table(table), options=options, **encoders)


def main() -> None:
    """Arguments: table, cache, shard, number of shards, seconds that each clip takes longer; tells each clip."""
    table, folder, shard, num_shards, delay_s = sys.argv[1:]

    def slowly(pixels: Tensor) -> Tensor:
        print("clip", flush=True)  # noqa: T201 # the test reads it
        time.sleep(float(delay_s))
        return encode_video(pixels)

    options = FillOptions(shard=int(shard), num_shards=int(num_shards))
    fill_with_pooling(Path(table), Path(folder), options=options, encode_video=slowly)


if __name__ == "__main__":
    main()
