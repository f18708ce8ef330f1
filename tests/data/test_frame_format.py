"""Pixels as the stream means them: levels written without loss, against the formulas of H.273 in float64.

Fast 4:2:0 arithmetic of FFmpeg may be 3 levels off, 4:4:4 half a level. What is not shown as it is must be refused by name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from qvgen.data.clip_process import ClipReader
from qvgen.data.clips import BadClip, Bucket, CutSettings
from qvgen.data.video_reader import probe_video, read_frames, read_video
from tests.data.video_files import (
    box,
    counting_frames,
    insert_box,
    set_display_matrix,
    write_changing,
    write_clip,
    write_planes,
    write_stream,
)

LUMA = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
"""Kr and Kb of H.273's matrices."""
LIMITED, FULL = 1, 2


def to_rgb(levels: np.ndarray, *, matrix: int, full: bool, bits: int) -> np.ndarray:
    """YCbCr levels [..., 3] -> R'G'B' in 0..255, by the formulas."""
    kr, kb = LUMA[matrix]
    scale, top = 2.0 ** (bits - 8), 2.0**bits - 1
    y = levels[..., 0] / top if full else (levels[..., 0] - 16 * scale) / (219 * scale)
    cb, cr = ((levels[..., i] - 128 * scale) / (top if full else 224 * scale) for i in (1, 2))
    r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    g = (y - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(255 * np.stack([r, g, b], axis=-1), 0, 255)


def patches(bits: int = 8, *, height: int = 48, width: int = 64) -> np.ndarray:
    """Colours that no matrix clips, YCbCr [H, W, 3]: squares of 16 pixels, some saturated."""
    generator = np.random.default_rng(7)
    small = np.stack(
        [generator.integers(low, high, (height // 16, width // 16)) for low, high in ((90, 160), (96, 160), (96, 160))],
        -1,
    )
    dtype = np.uint8 if bits == 8 else np.uint16
    return (small * 2 ** (bits - 8)).astype(dtype).repeat(16, axis=0).repeat(16, axis=1)


def planes(levels: np.ndarray, *, halved: int) -> list[np.ndarray]:
    return [levels[..., 0], *(np.ascontiguousarray(levels[::halved, ::halved, i]) for i in (1, 2))]


def centres(picture: np.ndarray) -> np.ndarray:
    return picture[8::16, 8::16].astype(float)


@pytest.mark.parametrize("matrix", [1, 4, 5, 6, 7, 9])
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize(("pixels", "bits", "halved", "error"), [
    ("yuv420p", 8, 2, 3.0), ("yuv444p", 8, 1, 0.51), ("yuv420p10le", 10, 2, 3.5)])  # fmt: skip
def test_matrix_range_and_depth(
    tmp_path: Path, matrix: int, color_range: int, pixels: str, bits: int, halved: int, error: float
) -> None:
    levels = patches(bits)
    path = write_planes(
        tmp_path / "a.mkv",
        [planes(levels, halved=halved)],
        pixels=pixels,
        colorspace=matrix,
        color_range=color_range,
        color_primaries=1,
    )
    wanted = centres(to_rgb(levels.astype(float), matrix=matrix, full=color_range == FULL, bits=bits))
    assert np.abs(centres(read_video(path)[0]) - wanted).max() <= error
    assert probe_video(path).treatment == ("10 bits" if bits == 10 else "")


@pytest.mark.parametrize(
    ("height", "width", "primaries", "matrix"),
    [(576, 1024, 2, 5), (720, 1280, 2, 1), (1024, 576, 2, 5), (1280, 720, 2, 1), (48, 64, 1, 1), (48, 64, 6, 5),
     (720, 1280, 5, 5)],
)  # fmt: skip
def test_a_stream_that_names_no_matrix(tmp_path: Path, height: int, width: int, primaries: int, matrix: int) -> None:
    levels = patches(height=height, width=width)
    path = write_planes(tmp_path / "a.mkv", [planes(levels, halved=2)], pixels="yuv420p", color_primaries=primaries)
    wanted, other = (centres(to_rgb(levels.astype(float), matrix=m, full=False, bits=8)) for m in (matrix, 6 - matrix))
    found = centres(read_video(path)[0])
    assert np.abs(found - wanted).max() <= 3
    assert np.abs(found - other).max() > 6
    assert probe_video(path).treatment == ("matrix 1" if matrix == 1 else "")


def test_grey_and_rgb_keep_their_levels(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    for color_range, wanted in (
        (FULL, ramp),
        (LIMITED, np.rint(np.clip((ramp.astype(float) - 16) * 255 / 219, 0, 255))),
    ):
        path = write_planes(tmp_path / f"{color_range}.mkv", [[ramp]], pixels="gray", color_range=color_range)
        np.testing.assert_array_equal(read_video(path)[0], np.repeat(wanted[..., None], 3, axis=-1))
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    path = write_planes(tmp_path / "rgb.mov", [[picture]], pixels="rgb24", codec="qtrle")
    np.testing.assert_array_equal(read_video(path)[0], picture)


BT709, BT2020, P3 = 1, 9, 12
XYZ_709 = [[0.4123908, 0.3575843, 0.1804808], [0.2126390, 0.7151687, 0.0721923], [0.0193308, 0.1191948, 0.9505322]]
XYZ = {
    BT2020: [[0.6369580, 0.1446169, 0.1688810], [0.2627002, 0.6779981, 0.0593017], [0.0, 0.0280727, 1.0609851]],
    P3: [[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0.0, 0.0451134, 1.0439444]],
}
"""Published matrices, linear RGB with D65 -> XYZ."""


@pytest.mark.parametrize(("primaries", "matrix", "transfer"), [(BT2020, 9, 14), (BT2020, 9, 1), (P3, 1, 13), (9, 2, 2)])
def test_wide_primaries_are_shown_on_an_ordinary_display(
    tmp_path: Path, primaries: int, matrix: int, transfer: int
) -> None:
    levels = patches()
    tags = {"colorspace": matrix, "color_primaries": primaries, "color_trc": transfer}
    path = write_planes(tmp_path / "a.mkv", [planes(levels, halved=1)], pixels="yuv444p", **tags)
    levels = to_rgb(levels.astype(float), matrix=9 if matrix == 2 else matrix, full=False, bits=8) / 255
    srgb = transfer == 13
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4) if srgb else levels**2.4
    light = np.clip(light @ (np.linalg.inv(XYZ_709) @ XYZ[primaries]).T, 0, 1)
    wanted = (
        np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) if srgb else light ** (1 / 2.4)
    )
    found = centres(read_video(path)[0])
    assert np.abs(found - centres(255 * wanted)).max() <= 2.5
    assert np.abs(found - centres(255 * levels)).max() > 8
    assert f"primaries {primaries}" in probe_video(path).treatment


def test_the_primaries_of_bt601_are_taken_for_bt709(tmp_path: Path) -> None:
    paths = [
        write_planes(tmp_path / f"{primaries}.mkv", [planes(patches(), halved=2)], pixels="yuv420p", colorspace=6,
                     color_primaries=primaries) for primaries in (1, 5, 6)
    ]  # fmt: skip
    frames = [read_video(path) for path in paths]
    np.testing.assert_array_equal(frames[0], frames[1])
    np.testing.assert_array_equal(frames[0], frames[2])


TAGS_REFUSED = [
    ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, r"is HDR \(transfer PQ.*tone-map it to BT.709"),
    ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, r"is HDR \(transfer HLG"),
    ({"color_trc": 8}, "has linear levels"),
    ({"color_trc": 9}, "has logarithmic levels"),
    ({"colorspace": 8}, "has the colour matrix YCgCo"),
    ({"colorspace": 10}, "has the colour matrix BT.2020 with constant luminance"),
    ({"colorspace": 14}, "has the colour matrix ICtCp"),
    ({"color_primaries": 11}, "has the colour primaries DCI-P3"),
    ({"color_primaries": 4}, "has the colour primaries BT.470 M"),
]


@pytest.mark.parametrize(("tags", "reason"), TAGS_REFUSED)
def test_colours_that_no_ordinary_display_shows_are_refused(tmp_path: Path, tags: dict[str, int], reason: str) -> None:
    path = write_planes(tmp_path / "a.mkv", [planes(patches(), halved=2)] * 4, pixels="yuv420p", **tags)
    with pytest.raises(ValueError, match=rf"a\.mkv {reason}"):
        read_frames(path, lambda info: [0])


def test_the_list_of_bad_clips_gets_the_reason(tmp_path: Path) -> None:
    path = write_planes(tmp_path / "a.mkv", [planes(patches(), halved=2)] * 4, pixels="yuv420p", color_trc=16)
    settings = CutSettings(fps=16, buckets=(Bucket(frames=4, height=48, width=64),))
    with ClipReader() as reader, pytest.raises(BadClip, match="is HDR"):
        reader.cut(path, settings=settings)


ORIENTATIONS = {
    (1, 0, 0, 1): lambda f: f,
    (-1, 0, 0, 1): lambda f: f[:, :, ::-1],
    (1, 0, 0, -1): lambda f: f[:, ::-1],
    (-1, 0, 0, -1): lambda f: f[:, ::-1, ::-1],
    (0, 1, -1, 0): lambda f: np.rot90(f, k=-1, axes=(1, 2)),
    (0, -1, 1, 0): lambda f: np.rot90(f, k=1, axes=(1, 2)),
    (0, 1, 1, 0): lambda f: f.transpose(0, 2, 1, 3),
    (0, -1, -1, 0): lambda f: np.rot90(f, k=1, axes=(1, 2))[:, :, ::-1],
}


def test_every_orientation_is_put_upright(tmp_path: Path) -> None:
    frames = counting_frames(2)
    frames[:, :16, :40], frames[:, 32:, :16] = 255, 0
    stored = read_video(write_stream(tmp_path / "0.mp4", frames, codec="libx264"))
    for index, (matrix, upright) in enumerate(ORIENTATIONS.items()):
        path = write_stream(tmp_path / f"{index}.mp4", frames, codec="libx264")
        set_display_matrix(path, *matrix)
        info, found = read_frames(path, lambda info: [0, 1])
        np.testing.assert_array_equal(found, upright(stored))
        assert (info.height, info.width) == found.shape[1:3]
        is_mirrored = matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0
        assert ("mirrored" in info.treatment) == is_mirrored
    set_display_matrix(path, 1, 1, -1, 1)
    with pytest.raises(ValueError, match="is turned by other than quarter turns"):
        probe_video(path)


def test_interlaced_frames_are_refused(tmp_path: Path) -> None:
    frames = counting_frames(6)
    for name, codec, options in [
        ("a.mp4", "libx264", {"x264-params": "tff=1"}),
        ("a.mkv", "mpeg2video", {"flags": "+ildct"}),
    ]:
        path = write_stream(tmp_path / name, frames, codec=codec, fps=25, options=options)
        with pytest.raises(ValueError, match=rf"{name} is interlaced; deinterlace it first"):
            read_frames(path, lambda info: [0])


def test_transparent_frames_are_refused_and_opaque_ones_are_not(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 32, 4), dtype=np.uint8)
    for alpha in (255, 254):
        picture[..., 0] = 255
        picture[3, 5, 0] = alpha
        path = write_planes(tmp_path / f"{alpha}.mov", [[picture]], pixels="argb", codec="qtrle")
        if alpha == 255:
            np.testing.assert_array_equal(read_video(path)[0], picture[..., 1:])
        else:
            with pytest.raises(ValueError, match="254.mov is transparent in part"):
                read_video(path)
    levels = planes(patches(), halved=2)
    path = write_planes(
        tmp_path / "a.webm", [[*levels, levels[0]]] * 2, pixels="yuva420p", codec="libvpx-vp9"
    )  # FFmpeg's decoder leaves the alpha channel aside
    with pytest.raises(ValueError, match=r"a\.webm has an alpha channel beside its frames"):
        probe_video(path)


def test_pictures_with_a_palette(tmp_path: Path) -> None:
    """An animated PNG and a GIF, opaque and with a transparent colour."""
    pictures = [Image.fromarray(frame).quantize(8) for frame in counting_frames(3)]
    for name in ("a.png", "a.gif"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
        assert np.abs(read_video(tmp_path / name).astype(int) - counting_frames(3)).max() <= 8
    clear = Image.fromarray(np.pad(counting_frames(1)[0], ((0, 0), (0, 0), (0, 1)), constant_values=255), "RGBA")
    clear.putpixel((5, 5), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.gif", save_all=True, append_images=[clear], duration=100, disposal=2)
    with pytest.raises(ValueError, match=r"clear\.gif is transparent in part"):
        read_video(tmp_path / "clear.gif")


def test_animated_webp_has_the_same_rules(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in counting_frames(4)]

    def save(name: str, **options: object) -> Path:
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], lossless=True, **options)
        return tmp_path / name

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    path = save("turned.webp", duration=100, exif=exif)
    info, frames = read_frames(path, lambda info: [1])
    assert (info.height, info.width, frames.shape[1:3]) == (64, 48, (64, 48))
    np.testing.assert_array_equal(frames[0], np.rot90(counting_frames(4)[1], k=-1))
    info = probe_video(save("uneven.webp", duration=[100, 100, 400, 100]))
    assert info.times_s == (0.0, 0.1, 0.2, 0.6)
    with pytest.raises(ValueError, match="has the same time stamp on all of its 4 frames"):
        probe_video(save("timeless.webp", duration=0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert probe_video(save("srgb.webp", duration=100, icc_profile=srgb)).num_frames == 4
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    with pytest.raises(ValueError, match="has a colour profile other than sRGB"):
        probe_video(save("other.webp", duration=100, icc_profile=lab))
    pictures = [picture.convert("RGBA") for picture in pictures]
    pictures[2].putpixel((3, 4), (1, 2, 3, 7))
    path = save("clear.webp", duration=100)
    assert read_frames(path, lambda info: [0, 1])[1].shape == (2, 48, 64, 3)
    with pytest.raises(ValueError, match=r"is transparent in part \(picture 2\)"):
        read_frames(path, lambda info: [1, 2])


def test_stereo_panoramas_and_dolby_vision_alone_are_refused(tmp_path: Path) -> None:
    path = write_stream(
        tmp_path / "stereo.mp4", counting_frames(2), codec="libx264", options={"x264-params": "frame-packing=3"}
    )
    with pytest.raises(ValueError, match="holds two views in one picture"):
        probe_video(path)
    path = write_clip(tmp_path / "sphere.mp4", 2)
    version = bytes(4)
    header, view = (
        box(b"prhd", version + bytes(12)),
        box(b"equi", version + bytes(16)),
    )  # looking ahead, all of the sphere
    insert_box(path, box(b"svhd", version + b"\0") + box(b"proj", header + view), kind=b"sv3d")
    with pytest.raises(ValueError, match="is a panorama on a sphere"):
        probe_video(path)
    path = write_clip(tmp_path / "dolby.mp4", 2)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"avc1", b"dva1"))
    with pytest.raises(ValueError, match="is Dolby Vision without a compatible picture"):
        probe_video(path)


def test_a_change_in_mid_stream_is_refused_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    sizes = [(48, 64), (32, 64)]
    write_changing(path, [counting_frames(4, height=height, width=width) for height, width in sizes])
    assert read_frames(path, lambda info: [0, 3])[1].shape == (2, 48, 64, 3)
    with pytest.raises(ValueError, match="changes in mid-stream from height 48 to height 32; cut it there"):
        read_frames(path, lambda info: [2, 5])
