"""Clips as cached pixels, against the clips cut directly; the clips held out are those of the latents' cache."""

from pathlib import Path

import pytest
import torch

from qvgen.data.clip_source import ClipSource
from qvgen.data.clips import Bucket, CutSettings, cut_clip, to_pixels
from qvgen.data.pixel_clips import PixelClips, pixels_from_bytes
from qvgen.errors import UserError
from tests.data.video_files import write_clip
from tests.models.small_folders import make_text_encoder, small_family

NAMES = [f"clip-{index}.mp4" for index in range(5)]
CUT = CutSettings(fps=8.0, buckets=(Bucket(frames=9, height=32, width=48),))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for index, name in enumerate(NAMES):
        write_clip(folder / name, 18 + 2 * index, fps=(8, 16)[index % 2])
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},a red boat\n" for name in NAMES))
    return folder


def source(clips: Path, cache: Path, **changes) -> ClipSource:
    values = {"videos": None, "fps": None, "buckets": None, "max_bad": 0.0, "held_out": 1, "timeout_s": 60.0}
    return ClipSource(path=str(clips), cache=str(cache), **{**values, **changes})


def test_the_cache_holds_the_clips_own_bytes(clips: Path, tmp_path: Path) -> None:
    family = PixelClips(small_family())
    data = source(clips, tmp_path / "cache")
    assert data.cut_settings(family) == CUT
    report = data.fill(family, captions=())
    assert report.complete
    assert report.encoded == len(NAMES)
    train, held_out = (data.open(family, split=split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (4, 1)
    assert (train.num_clips, held_out.num_clips) == (4, 1)
    assert " s of 4 clips are used (4 are longer than their cut)" in train.left_out
    assert train.left_out.endswith(f"see {report.left_out_report}")
    samples = [split.samples[index] for split in (train, held_out) for index in range(len(split))]
    assert sorted(sample["sample_id"] for sample in samples) == list(range(len(NAMES)))
    for sample in samples:
        frames = cut_clip(clips / NAMES[sample["sample_id"]], settings=CUT)[1]
        assert sample["video"].dtype == torch.uint8
        assert sample["video"].shape == family.sample_shape
        assert torch.equal(sample["video"], torch.from_numpy(frames.copy()).permute(3, 0, 1, 2))
        assert torch.equal(pixels_from_bytes(sample["video"]), to_pixels(frames))
    assert data.fill(family, captions=()).encoded == 0


def test_every_byte_survives() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    assert torch.equal(PixelClips(small_family()).encode_video(pixels_from_bytes(every)), every)


def test_the_vae_and_the_transformer_hold_out_the_same_clips(clips: Path, tmp_path: Path) -> None:
    """Both share a cache folder and find nothing of each other's in it."""
    untrained = small_family()
    folder = untrained.write_skeleton(
        tmp_path / "model",
        vae=untrained.initial_vae(0),
        latents=([0.0] * 4, [1.0] * 4),
        text_folder=make_text_encoder(tmp_path / "text"),
    )
    data = source(clips, tmp_path / "cache", held_out=2)
    found = []
    for family in (PixelClips(untrained), small_family(folder)):
        assert data.fill(family, captions=()).encoded == len(NAMES)
        split = data.open(family, split="held_out")
        found.append([split.samples[index] for index in range(len(split))])
    pixels, latents = found
    assert [sample["sample_id"] for sample in pixels] == [sample["sample_id"] for sample in latents]
    assert pixels[0]["video"].dtype == torch.uint8
    assert latents[0]["video"].shape == small_family(folder).sample_shape


def test_what_does_not_fit_is_refused(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a clip of 9x30x48 does not fit small"):
        source(clips, tmp_path, buckets=["9x30x48"]).check(PixelClips(small_family()))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "metadata.csv").write_text("file_name,text\nbroken.mp4,a red boat\n")
    with pytest.raises(UserError, match="1 of 1 clips can't be used"):
        source(tmp_path, tmp_path / "cache").fill(PixelClips(small_family()), captions=())
